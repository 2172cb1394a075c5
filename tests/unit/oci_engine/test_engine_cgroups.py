"""Control groups as trees of files: where they are, what is written where, what is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine import making
from oci_engine.cgroups.find import known_cgroup
from oci_engine.cgroups.mounted import Hierarchy, hierarchies, is_unified, own_unified
from oci_engine.cgroups.v1 import CgroupV1
from oci_engine.cgroups.v2 import CgroupV2, io_weight_of, weight_of
from oci_engine.errors import SetupFailed
from oci_engine.records import replace
from oci_engine.resources_spec import Cpu, DeviceWeight, Memory, Rdma, Resources, Throttle
from oci_engine.spec import read_spec
from oci_engine.state import Status, start_time

if TYPE_CHECKING:
    from pathlib import Path

HYBRID = """\
20 1 0:1 / /sys/fs/cgroup ro - tmpfs tmpfs ro
21 20 0:20 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
22 20 0:21 /docker/x /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory
23 20 0:22 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
24 20 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
25 20 0:21 / /mnt/again\\040here rw - cgroup cgroup rw,memory
"""
OWN = "4:memory:/docker/x/mine\n3:cpuacct,cpu:/user\n2:name=systemd:/init.scope\n0::/\n"
PURE = "30 1 0:1 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_where_the_trees_are() -> None:
    assert not is_unified(HYBRID)
    assert is_unified(PURE)
    assert hierarchies(HYBRID, OWN) == [
        Hierarchy(controllers=("cpu", "cpuacct"), point="/sys/fs/cgroup/cpu,cpuacct", own="user"),
        Hierarchy(controllers=("memory",), point="/sys/fs/cgroup/memory", own="mine"),
        Hierarchy(controllers=("name=systemd",), point="/sys/fs/cgroup/systemd", own="init.scope"),
    ]
    assert own_unified("0::/user.slice/x\n") == "user.slice/x"


def test_paths_from_the_top_and_from_the_callers_group() -> None:
    trees = hierarchies(HYBRID, OWN)
    assert CgroupV1.below("/pod/c", trees).paths == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/pod/c", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/pod/c",
        "memory": "/sys/fs/cgroup/memory/pod/c", "name=systemd": "/sys/fs/cgroup/systemd/pod/c",
    }  # fmt: skip
    assert CgroupV1.below("c", trees).paths["memory"] == "/sys/fs/cgroup/memory/mine/c"


@pytest.fixture
def v2(tmp_path: Path) -> CgroupV2:
    """A group made of plain files, with all that a kernel offers."""
    group = CgroupV2("/pod/c", str(tmp_path))
    (tmp_path / "cgroup.controllers").write_text("cpu memory rdma\n")
    (tmp_path / "cgroup.subtree_control").touch()
    group.create()
    for name in (
        "cpu.weight", "cpu.max", "cpu.max.burst", "cpu.idle", "cpuset.cpus", "cpuset.mems", "memory.max", "memory.low",
        "memory.swap.max", "pids.max", "io.max", "io.weight", "hugetlb.2MB.max", "memory.high",
        "rdma.max",
    ):  # fmt: skip
        (tmp_path / "pod" / "c" / name).touch()
    return group


def test_controllers_are_passed_on(v2: CgroupV2, tmp_path: Path) -> None:
    # A real file of this kind adds up what is written; this one shows the last.
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"


def test_limits_of_version_2(v2: CgroupV2, tmp_path: Path) -> None:
    v2.limit(
        Resources(
            cpu=Cpu(shares=1024, quota=50000, period=200000, burst=7, cpus="0-1", mems="0", idle=0),
            memory=Memory(limit=1000, reservation=500, swap=1500),
            pids_limit=12,
            block_weight=500,
            throttles=(Throttle(file="write_bps_device", major=8, minor=16, rate=99),),
            hugepages=(("2MB", 4096),),
            unified=(("memory.high", "900"),),
            rdma=(Rdma(device="mlx5_1", handles=3, objects=None),),
        ),
        devices=False,
    )
    expected = {
        "cpu.weight": "39", "cpu.max": "50000 200000", "cpu.max.burst": "7", "cpu.idle": "0", "cpuset.cpus": "0-1",
        "cpuset.mems": "0", "memory.max": "1000", "memory.low": "500", "memory.swap.max": "500", "pids.max": "12",
        "io.max": "8:16 wbps=99", "io.weight": "default 4950", "hugetlb.2MB.max": "4096", "memory.high": "900",
        "rdma.max": "mlx5_1 hca_handle=3 hca_object=max",
    }  # fmt: skip
    assert {name: (tmp_path / "pod" / "c" / name).read_text() for name in expected} == expected


def test_no_limits_of_version_2(v2: CgroupV2, tmp_path: Path) -> None:
    folder = tmp_path / "pod" / "c"
    v2.limit(Resources(cpu=Cpu(quota=-1), memory=Memory(limit=-1, swap=-1), pids_limit=-1), devices=False)
    assert (folder / "cpu.max").read_text() == "max 100000"
    assert (folder / "memory.max").read_text() == "max"
    assert (folder / "memory.swap.max").read_text() == "max"
    assert (folder / "pids.max").read_text() == "max"
    (folder / "cpu.max").write_text("5000 100000")
    v2.limit(Resources(cpu=Cpu(period=50000)), devices=False)
    assert (folder / "cpu.max").read_text() == "5000 50000"


@pytest.mark.parametrize(
    ("resources", "place"),
    [
        (Resources(memory=Memory(swappiness=10)), "memory.swappiness"),
        (Resources(memory=Memory(disable_oom_killer=True)), "memory.disableOOMKiller"),
        (Resources(memory=Memory(limit=100, swap=50)), "memory.swap"),
        (Resources(cpu=Cpu(realtime_runtime=1)), "cpu.realtimeRuntime"),
        (Resources(hugepages=(("1GB", 0),)), "hugepageLimits"),
        (Resources(block_leaf_weight=10), "blockIO.leafWeight"),
        (
            Resources(block_weights=(DeviceWeight(major=8, minor=0, weight=None, leaf_weight=9),)),
            "blockIO.leafWeight",
        ),
    ],
)
def test_what_version_2_cannot_do(v2: CgroupV2, resources: Resources, place: str) -> None:
    with pytest.raises(SetupFailed, match=f"linux.resources.{place}"):
        v2.limit(resources, devices=False)


@pytest.mark.parametrize(("shares", "weight"), [(0, 1), (2, 1), (1024, 39), (262144, 10000), (10**9, 10000)])
def test_weights(shares: int, weight: int) -> None:
    assert weight_of(shares) == weight


def test_io_weights() -> None:
    assert (io_weight_of(10), io_weight_of(1000)) == (1, 10000)


def test_statistics_of_version_2(v2: CgroupV2, tmp_path: Path) -> None:
    folder = tmp_path / "pod" / "c"
    for name, text in {
        "cpu.stat": "usage_usec 12\nuser_usec 7\nsystem_usec 5\nnr_periods 3\nnr_throttled 2\nthrottled_usec 9\n",
        "memory.current": "100\n", "memory.max": "max\n", "memory.peak": "200\n", "memory.stat": "anon 1\nfile 40\n",
        "memory.events": "low 0\nmax 6\n", "memory.swap.current": "5\n", "memory.swap.max": "max\n",
        "pids.current": "3\n", "pids.max": "10\n", "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    stats: Any = v2.stats()
    assert stats["cpu"]["usage"] == {"total": 12000, "user": 7000, "kernel": 5000}
    assert stats["cpu"]["throttling"] == {"periods": 3, "throttledPeriods": 2, "throttledTime": 9000}
    assert stats["memory"]["usage"] == {"limit": 2**64 - 1, "usage": 100, "max": 200, "failcnt": 6}
    assert stats["memory"]["swap"]["usage"] == 105
    assert stats["memory"]["cache"] == 40
    assert stats["pids"] == {"current": 3, "limit": 10}
    assert {"major": 8, "minor": 0, "op": "write", "value": 2} in stats["blkio"]["ioServiceBytesRecursive"]


def v1(tmp_path: Path, *controllers: str) -> CgroupV1:
    trees = [Hierarchy(controllers=(name,), point=str(tmp_path / name), own="") for name in controllers]
    for name in controllers:
        (tmp_path / name).mkdir()
    return CgroupV1.below("/a/b", trees)


def test_empty_cpusets_are_inherited_from_far_above(tmp_path: Path) -> None:
    group = v1(tmp_path, "cpuset")
    for folder in ("", "a/", "a/b/"):
        (tmp_path / "cpuset" / folder).mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            (tmp_path / "cpuset" / folder / name).write_text("0-3\n" if folder == "" else "")
    group.create()
    assert (tmp_path / "cpuset" / "a" / "cpuset.cpus").read_text() == "0-3"
    assert (tmp_path / "cpuset" / "a" / "b" / "cpuset.mems").read_text() == "0-3"


def test_a_controller_that_is_missing(tmp_path: Path) -> None:
    group = v1(tmp_path, "cpu")
    with pytest.raises(
        SetupFailed, match=r"linux.resources.memory.limit: this host has no memory controller"
    ):
        group.limit(Resources(memory=Memory(limit=1)), devices=False)
    with pytest.raises(SetupFailed, match=r"linux.resources.unified: this host has version 1"):
        group.limit(Resources(unified=(("memory.high", "1"),)), devices=False)
    with pytest.raises(SetupFailed, match="no freezer controller"):
        group.freeze(True)
    assert not group.is_frozen()


def test_what_is_not_asked_for_is_not_touched(tmp_path: Path) -> None:
    v1(tmp_path).limit(Resources(pids_limit=0), devices=False)
    CgroupV2("/x", str(tmp_path)).limit(Resources(pids_limit=0), devices=False)


WEIGHTS = Resources(
    block_weight=100, block_weights=(DeviceWeight(major=8, minor=16, weight=500, leaf_weight=None),)
)


@pytest.mark.parametrize(("file", "last"), [("io.weight", "8:16 4950"), ("io.bfq.weight", "8:16 500")])
def test_weights_of_disks(v2: CgroupV2, tmp_path: Path, file: str, last: str) -> None:
    (tmp_path / "pod" / "c" / file).touch()
    v2.limit(WEIGHTS, devices=False)
    assert (tmp_path / "pod" / "c" / file).read_text() == last


@pytest.mark.parametrize("name", ["blkio.weight", "blkio.bfq.weight"])
def test_weights_of_disks_in_version_1(tmp_path: Path, name: str) -> None:
    group = v1(tmp_path, "blkio")
    group.create()
    folder = tmp_path / "blkio" / "a" / "b"
    for file in (name, f"{name}_device", "blkio.leaf_weight", "blkio.leaf_weight_device"):
        (folder / file).touch()
    group.limit(
        Resources(
            block_weight=100,
            block_leaf_weight=200,
            block_weights=(DeviceWeight(major=8, minor=16, weight=500, leaf_weight=600),),
        ),
        devices=False,
    )
    assert [(folder / file).read_text() for file in (name, f"{name}_device")] == ["100", "8:16 500"]
    assert (folder / "blkio.leaf_weight").read_text() == "200"
    assert (folder / "blkio.leaf_weight_device").read_text() == "8:16 600"


def test_a_limit_below_what_is_used_is_refused_if_that_is_wished(v2: CgroupV2, tmp_path: Path) -> None:
    group = v1(tmp_path, "memory")
    group.create()
    one, two = tmp_path / "memory" / "a" / "b", tmp_path / "pod" / "c"
    (one / "memory.limit_in_bytes").touch()
    for file in (one / "memory.usage_in_bytes", two / "memory.current"):
        file.write_text("1000\n")
    for each in (group, v2):
        each.limit(Resources(memory=Memory(limit=1000, check_before_update=True)), devices=False)
        with pytest.raises(
            SetupFailed, match=r"memory\.limit: 999 bytes are less than the 1000 that are in use"
        ):
            each.limit(Resources(memory=Memory(limit=999, check_before_update=True)), devices=False)
        each.limit(Resources(memory=Memory(limit=999)), devices=False)
    assert (two / "memory.max").read_text() == (one / "memory.limit_in_bytes").read_text() == "999"


@pytest.mark.parametrize(
    ("cpu", "now"),
    [(Cpu(quota=50_000), "50000 20000"), (Cpu(period=40_000), "10000 40000"), (Cpu(quota=-1), "max 20000")],
)
def test_quota_and_period_of_version_2_are_changed_one_by_one(
    v2: CgroupV2, tmp_path: Path, cpu: Cpu, now: str
) -> None:
    file = tmp_path / "pod" / "c" / "cpu.max"
    file.write_text("10000 20000\n")
    v2.limit(Resources(cpu=cpu), devices=False)
    assert file.read_text() == now


def test_without_a_group_a_process_with_the_number_of_one_that_ended_is_nobodys() -> None:
    pid = os.getpid()
    status = Status(
        oci_version="1.0.2", id="c1", pid=pid, root="/r", bundle="/b", rootfs="/b/rootfs",
        process_start_time=start_time(pid), created="", owner=0, cgroup_paths={}, cgroups_path="", unit="",
        no_pivot=False, no_new_keyring=False, spec={},
    )  # fmt: skip
    assert known_cgroup(status).pids() == [pid]
    assert known_cgroup(replace(status, process_start_time=status.process_start_time - 1)).pids() == []
    assert known_cgroup(replace(status, pid=0, process_start_time=0)).pids() == []


def test_a_group_for_the_user_of_a_user_namespace(
    v2: CgroupV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((os.path.basename(path), uid)))
    v2.give_to(100_007)
    assert ("c", 100_007) in given
    assert ("cgroup.procs", 100_007) in given
    assert not [name for name, _ in given if name.endswith((".max", ".weight"))]


@pytest.mark.parametrize(
    ("options", "kinds", "uid", "owner"),
    [
        ((), ("user", "cgroup"), 7, 100_007), (("ro",), ("user", "cgroup"), 7, None), ((), ("user",), 7, None),
        ((), ("user", "cgroup"), 70_000, None),
    ],
)  # fmt: skip
def test_who_gets_a_group(
    options: tuple[str, ...], kinds: tuple[str, ...], uid: int, owner: int | None
) -> None:
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    document = {
        "ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": uid, "gid": 0}},
        "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "options": list(options)}],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", *kinds)],
            "uidMappings": mapping, "gidMappings": mapping,
        },
    }  # fmt: skip
    assert making._owner_of_group(read_spec(document)) == owner

"""Files of the kernel and files from the host: machine, namespaces, modules, statistics, copies."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from guest_agent import files, init, machine, modules, namespaces, stats, syscalls
from guest_agent.cgroup import Cgroup, enable_controllers
from guest_agent.errors import InvalidRequest, StateConflict


def write(root: Path, **contents: str) -> None:
    for name, text in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# Processors and memory


def test_everything_comes_online(tmp_path: Path) -> None:
    write(
        tmp_path, cpu__cpu1__online="0\n", cpu__cpu2__online="1\n", cpu__cpufreq__online="0\n", cpu__online="0-1,3\n",
        memory__memory7__state="offline\n", memory__memory8__state="online\n",
    )  # fmt: skip
    assert machine.bring_online(0, False, str(tmp_path)) == 3
    assert (tmp_path / "cpu/cpu1/online").read_text() == "1"
    assert (tmp_path / "cpu/cpufreq/online").read_text() == "0\n"
    assert (tmp_path / "memory/memory7/state").read_text() == "offline\n"
    machine.bring_online(3, True, str(tmp_path))
    assert (tmp_path / "memory/memory7/state").read_text() == "online"


@pytest.mark.parametrize(
    ("most", "left", "online"),
    [
        (2, 4, "0001"),
        (3, 4, "1001"),
        (4, 4, "1101"),
        (5, 4, "1111"),
        (9, 4, "1111"),
        (0, 4, "1111"),
        (0, 3, "1110"),
        (0, 0, "0000"),
    ],
)
def test_processors_are_parked_and_come_back(tmp_path: Path, most: int, left: int, online: str) -> None:
    """The first one has no such file on most machines; the last one's number has two digits."""
    names = ("cpu1", "cpu2", "cpu9", "cpu10")
    for name, state in zip(names, "0001", strict=True):
        write(tmp_path / "cpu" / name, online=f"{state}\n")
    write(tmp_path / "cpu" / "cpu0", topology="")
    write(tmp_path / "cpu", online="0,4\n")
    assert machine.bring_online(most, False, str(tmp_path)) == 2  # what the kernel's file says
    (tmp_path / "cpu/online").write_text("0-4\n")
    machine.take_offline(left + 1, str(tmp_path))
    assert "".join((tmp_path / "cpu" / name / "online").read_text().strip() for name in names) == online


def test_memory_blocks(tmp_path: Path) -> None:
    assert machine.memory_block_bytes(str(tmp_path)) == 0
    write(tmp_path, memory__block_size_bytes="8000000\n")
    assert machine.memory_block_bytes(str(tmp_path)) == 128 << 20
    assert not machine.can_probe_memory(str(tmp_path))
    write(tmp_path, memory__probe="")
    assert machine.can_probe_memory(str(tmp_path))


@pytest.mark.parametrize(("seconds", "microseconds"), [(-1, 0), (1, -1), (1, 1_000_000)])
def test_times_that_are_none(seconds: int, microseconds: int) -> None:
    with pytest.raises(InvalidRequest, match="no time of day"):
        machine.set_clock(seconds, microseconds)


# Kernel modules


class Loaded:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bytes, str]] = []
        self.error = 0
        monkeypatch.setattr(syscalls, "init_module", self.init_module)

    def init_module(self, image: bytes, parameters: str, name: str) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error), name)
        self.calls.append((image, parameters))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return Loaded(monkeypatch)


@pytest.fixture
def available(tmp_path: Path) -> modules.Modules:
    for name in ("low", "mid", "top"):
        (tmp_path / name).write_bytes(name.encode())
    lines = f"low {tmp_path}/low\nmid {tmp_path}/mid low inside\ntop {tmp_path}/top mid low\n"
    write(tmp_path, list=lines, builtin="inside\next4\n")
    return modules.Modules(f"{tmp_path}/list", f"{tmp_path}/builtin")


def test_modules_are_loaded_after_what_they_need_and_once(loaded: Loaded, available: modules.Modules) -> None:
    available.load("top", "a=1 b=2")
    available.load_if_present("mid")
    available.load_if_present("unknown")
    assert loaded.calls == [(b"low", ""), (b"mid", ""), (b"top", "a=1 b=2")]


def test_built_in_modules_need_nothing(loaded: Loaded, available: modules.Modules) -> None:
    available.load("ext4")
    assert loaded.calls == []
    with pytest.raises(modules.ModuleMissing, match="no kernel module 'no-such'"):
        available.load("no-such")


def test_a_module_that_is_there_already(loaded: Loaded, available: modules.Modules) -> None:
    loaded.error = 17
    available.load("low")
    loaded.error = 8
    with pytest.raises(OSError, match="Exec format error"):
        available.load("mid")


def test_a_kernel_without_any_modules(loaded: Loaded, tmp_path: Path) -> None:
    none = modules.Modules(f"{tmp_path}/nothing", f"{tmp_path}/nothing")
    none.load_if_present("virtio_pci")
    with pytest.raises(modules.ModuleMissing):
        none.load("virtio_pci")


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({}, []),
        ({"virtio0": "0x0013", "virtio1": "0x001a"}, []),
        ({"virtio0": "0x0005"}, ["virtio_balloon"]),
        ({"virtio0": "0x0018", "virtio1": "0x0004"}, ["virtio_mem", "virtio_rng"]),
    ],
    ids=str,
)
def test_drivers_of_devices_that_are_there(
    loaded: Loaded, tmp_path: Path, types: dict[str, str], expected: list[str]
) -> None:
    names = ("virtio_rng", "virtio_balloon", "virtio_mem")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    write(tmp_path, list="".join(f"{name} {tmp_path}/{name}\n" for name in names))
    (tmp_path / "devices").mkdir()
    for device, number in types.items():
        (tmp_path / "devices" / device).mkdir()
        (tmp_path / "devices" / device / "device").write_text(f"{number}\n")
    found = modules.Modules(f"{tmp_path}/list", f"{tmp_path}/builtin")
    found.load_for_devices(f"{tmp_path}/devices")
    assert sorted(image.decode() for image, _ in loaded.calls) == sorted(expected)
    found.load_for_devices(f"{tmp_path}/nothing")


# The first steps of PID 1


@pytest.mark.parametrize(("image", "first"), [(False, "root"), (True, "mount /tmp")])
def test_the_first_steps_are_in_order(monkeypatch: pytest.MonkeyPatch, image: bool, first: str) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(init, "root_is_image", lambda: image)
    monkeypatch.setattr(
        "guest_agent.init.syscalls.mount", lambda source, target, *rest: steps.append(f"mount {target}")
    )
    monkeypatch.setattr(init, "replace_root", lambda: steps.append("root"))
    monkeypatch.setattr(init, "mount_kernel_file_systems", lambda: steps.append("mounts"))
    monkeypatch.setattr(init, "read_settings", lambda: "settings")

    class Recorder:
        def load_if_present(self, name: str) -> None:
            steps.append(name)

    assert init.boot(Recorder()) == "settings"  # type: ignore[arg-type,comparison-overlap]
    assert steps == [first, "mounts", "virtio_pci", "vmw_vsock_virtio_transport"]


# Specifications


def prepared(config: dict[str, Any], pid_namespace: str = "") -> dict[str, Any]:
    config.setdefault("process", {})
    namespaces.adapt(config, "c1", pid_namespace)
    linux: dict[str, Any] = config["linux"]
    return linux


def test_namespaces_of_the_sandbox_are_shared() -> None:
    wanted = [{"type": kind} for kind in ("ipc", "uts", "mount", "cgroup", "network", "time", "pid")]
    linux = prepared({"hostname": "h", "linux": {"namespaces": wanted, "cgroupsPath": "/x"}})
    assert linux["namespaces"] == [
        {"type": "ipc", "path": "/proc/1/ns/ipc"},
        {"type": "uts", "path": "/proc/1/ns/uts"},
        {"type": "mount"},
        {"type": "cgroup"},
        {"type": "pid"},
    ]
    assert linux["cgroupsPath"] == "/kata/c1"


def test_a_shared_pid_namespace_and_the_least_there_must_be() -> None:
    config: dict[str, Any] = {"hostname": "h"}
    assert prepared(config, "/proc/9/ns/pid")["namespaces"] == [
        {"type": "mount"},
        {"type": "pid", "path": "/proc/9/ns/pid"},
    ]
    assert "hostname" not in config


def test_what_this_kernel_cannot_enforce_is_left_out_and_named(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "process": {"apparmorProfile": "cri-default", "selinuxLabel": "s0", "args": ["x"]},
        "linux": {
            "mountLabel": "m0",
            "resources": {
                "memory": {"limit": 5, "swappiness": 60},
                "cpu": {"shares": 2, "realtimePeriod": 9},
            },
        },
    }
    assert namespaces.adapt(config, "c1", "", str(tmp_path)) == [
        "apparmorProfile cri-default", "selinuxLabel s0", "memory.swappiness 60", "cpu.realtimePeriod 9",
        "mountLabel m0",
    ]  # fmt: skip
    assert config["process"] == {"args": ["x"]}
    assert "mountLabel" not in config["linux"]
    resources = config["linux"]["resources"]
    assert (resources["memory"], resources["cpu"]) == ({"limit": 5}, {"shares": 2})


def test_profiles_and_labels_stay_where_the_kernel_has_the_module(tmp_path: Path) -> None:
    write(
        tmp_path, kernel__security__apparmor__profiles="q (complain)\np (enforce)\n", fs__selinux__enforce="1"
    )
    config: dict[str, Any] = {
        "process": {"apparmorProfile": "p", "selinuxLabel": "s0"}, "linux": {"mountLabel": "m0"},
    }  # fmt: skip
    assert namespaces.adapt(config, "c1", "", str(tmp_path)) == []
    assert config["process"] == {"apparmorProfile": "p", "selinuxLabel": "s0"}
    assert config["linux"]["mountLabel"] == "m0"


def test_limits_on_huge_pages_that_the_guest_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "kernel/mm/hugepages/hugepages-2048kB").mkdir(parents=True)
    limits = [{"pageSize": size, "limit": 0} for size in ("2MB", "1GB", "64KB", "odd")]
    config: dict[str, Any] = {"process": {}, "linux": {"resources": {"hugepageLimits": limits}}}
    assert namespaces.adapt(config, "c1", "", str(tmp_path)) == []
    assert config["linux"]["resources"]["hugepageLimits"] == limits[:1]


def test_sysctls(tmp_path: Path) -> None:
    write(tmp_path, net__ipv4__ip_forward="0", net__ipv4__conf__eth0__rp_filter="0")
    namespaces.apply_sysctls({"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0/rp_filter": "2"}, str(tmp_path))
    assert (tmp_path / "net/ipv4/ip_forward").read_text() == "1"
    assert (tmp_path / "net/ipv4/conf/eth0/rp_filter").read_text() == "2"


@pytest.mark.parametrize("name", ["no.such", "../../etc/passwd", "net/../x"])
def test_wrong_sysctls_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"sysctl '?{name}"):
        namespaces.apply_sysctls({name: "1"}, str(tmp_path / "root"))


# Cgroups and statistics


@pytest.fixture
def cgroup(tmp_path: Path) -> Cgroup:
    write(
        tmp_path / "kata" / "c1",
        **{
            "cpu.stat": "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 1\nthrottled_usec 9\n",
            "memory.stat": "anon 10\nfile 20\nkernel 30\ninactive_file 7\npgmajfault 8\n",
            "memory.events": "low 0\nmax 4\noom_kill 2\n",
            "memory.current": "100\n", "memory.peak": "150\n", "memory.max": "max\n",
            "memory.swap.current": "11\n", "memory.swap.max": "0\n",
            "pids.current": "3\n", "pids.max": "max\n",
            "io.stat": "7:0 \n7:1 8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n254:16 rbytes=9 rios=1\n",
            "hugetlb.2MB.current": "6\n", "hugetlb.2MB.rsvd.current": "1\n", "hugetlb.2MB.events": "max 2\n",
            "cgroup.events": "populated 1\nfrozen 0\n",
        },
    )  # fmt: skip
    return Cgroup("c1", str(tmp_path))


def test_statistics(cgroup: Cgroup) -> None:
    found = stats.container_stats(cgroup).cgroup_stats
    usage = found.cpu_stats.cpu_usage
    assert (usage.total_usage, usage.usage_in_usermode, usage.usage_in_kernelmode) == (5000, 3000, 2000)
    throttling = found.cpu_stats.throttling_data
    assert (throttling.periods, throttling.throttled_periods, throttling.throttled_time) == (7, 1, 9000)
    memory = found.memory_stats
    assert (memory.usage.usage, memory.usage.max_usage, memory.usage.failcnt, memory.cache) == (
        100,
        150,
        4,
        20,
    )
    assert memory.usage.limit == memory.swap_usage.limit == 2**64 - 1
    assert memory.swap_usage.usage == 111
    assert dict(memory.stats) == {
        "anon": 10, "file": 20, "kernel": 30, "inactive_file": 7, "pgmajfault": 8,
        "hierarchical_memory_limit": 2**64 - 1, "events.low": 0, "events.max": 4, "events.oom_kill": 2,
    }  # fmt: skip
    assert (found.pids_stats.current, found.pids_stats.limit) == (3, 0)
    io = found.blkio_stats.io_service_bytes_recursive
    assert [(entry.major, entry.minor, entry.op, entry.value) for entry in io] == [
        (8, 0, "Read", 1), (8, 0, "Write", 2), (8, 0, "Discard", 0), (254, 16, "Read", 9),
    ]  # fmt: skip
    assert [entry.value for entry in found.blkio_stats.io_serviced_recursive] == [3, 4, 0, 1]
    assert (found.hugetlb_stats["2MB"].usage, found.hugetlb_stats["2MB"].failcnt) == (6, 2)


def test_loopback_is_not_the_pods_network(cgroup: Cgroup) -> None:
    names = [interface.name for interface in stats.network_stats()]
    found = [interface.name for interface in stats.container_stats(cgroup).network_stats]
    assert "lo" in names
    assert found == [name for name in names if name != "lo"]


def test_statistics_of_a_group_that_is_gone(tmp_path: Path) -> None:
    assert stats.container_stats(Cgroup("gone", str(tmp_path))).cgroup_stats.memory_stats.usage.usage == 0


def test_network_statistics(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    path.write_text(
        "h\nh\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n    lo:0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    )
    first, second = stats.network_stats(str(path))
    assert first == pb.NetworkStats(
        name="eth0", rx_bytes=1, rx_packets=2, rx_errors=3, rx_dropped=4,
        tx_bytes=9, tx_packets=10, tx_errors=11, tx_dropped=12,
    )  # fmt: skip
    assert second == pb.NetworkStats(name="lo")


def test_volume_statistics(tmp_path: Path) -> None:
    space, inodes = stats.volume_stats(str(tmp_path)).usage
    assert space.used <= space.total
    assert space.available <= space.total
    assert inodes.total > 0


def test_cgroup_verbs(cgroup: Cgroup, tmp_path: Path) -> None:
    assert cgroup.populated
    assert not cgroup.frozen
    write(tmp_path / "kata" / "c1", **{"cgroup.kill": "", "cgroup.freeze": "0"})
    cgroup.kill()
    cgroup.freeze(True)
    assert Path(cgroup.path, "cgroup.kill").read_text() == "1"
    assert Path(cgroup.path, "cgroup.freeze").read_text() == "1"
    gone = Cgroup("gone", str(tmp_path))
    gone.kill()
    gone.remove()
    with pytest.raises(StateConflict, match="no cgroup /kata/gone"):
        gone.freeze(True)


def test_controllers_go_to_the_containers(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "kata"):
        write(directory, **{"cgroup.controllers": "memory cpu rdma pids\n", "cgroup.subtree_control": ""})
    enable_controllers(str(tmp_path))
    for directory in (tmp_path, tmp_path / "kata"):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


# Files from the host


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def request(base: Path, name: str, **fields: Any) -> pb.CopyFileRequest:
    owner = {"uid": os.getuid(), "gid": os.getgid()}
    return pb.CopyFileRequest(path=f"{base}/{name}", **{"dir_mode": 0o750, **owner, **fields})


def test_a_file_appears_when_it_is_complete(base: Path) -> None:
    mode = stat.S_IFREG | 0o640
    files.copy(request(base, "d/f", file_mode=mode, file_size=6, offset=0, data=b"abc"), str(base))
    assert not (base / "d/f").exists()
    files.copy(request(base, "d/f", file_mode=mode, file_size=6, offset=3, data=b"def"), str(base))
    assert (base / "d/f").read_bytes() == b"abcdef"
    assert (base / "d/f").stat().st_mode & 0o7777 == 0o640
    assert (base / "d").stat().st_mode & 0o7777 == 0o750
    assert os.listdir(base / "d") == ["f"]


def test_a_file_is_replaced(base: Path) -> None:
    for text in (b"longer text", b"new", b""):
        files.copy(
            request(base, "f", file_mode=stat.S_IFREG | 0o600, file_size=len(text), data=text), str(base)
        )
        assert (base / "f").read_bytes() == text


def test_directories_and_links(base: Path) -> None:
    files.copy(request(base, "d", file_mode=stat.S_IFDIR | 0o700), str(base))
    files.copy(request(base, "d", file_mode=stat.S_IFDIR | 0o711), str(base))
    assert (base / "d").stat().st_mode & 0o7777 == 0o711
    for target in (b"one", b"/two"):
        files.copy(request(base, "l", file_mode=stat.S_IFLNK | 0o777, data=target), str(base))
        assert os.readlink(base / "l") == target.decode()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "", "a//b", ".", "a/./b"])
def test_paths_that_leave_the_directory(base: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a path below"):
        files.copy(request(base, name, file_mode=stat.S_IFDIR), str(base))


def test_links_in_the_way_are_not_followed(base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    base.mkdir()
    (base / "link").symlink_to(outside)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        files.copy(request(base, "link/f", file_mode=stat.S_IFREG, file_size=1, data=b"x"), str(base))
    (base / "f.tmp").symlink_to(outside / "made")
    files.copy(request(base, "f", file_mode=stat.S_IFREG | 0o600, file_size=1, data=b"x"), str(base))
    assert os.listdir(outside) == []


@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (3, 5), (0, 2)])
def test_pieces_that_do_not_fit(base: Path, offset: int, size: int) -> None:
    with pytest.raises(InvalidRequest, match=f"of a file of {size}"):
        files.copy(
            request(base, "f", file_mode=stat.S_IFREG, offset=offset, file_size=size, data=b"abc"), str(base)
        )


@pytest.mark.parametrize("target", [b"", b"a\0b"])
def test_links_to_nothing(base: Path, target: bytes) -> None:
    with pytest.raises(InvalidRequest, match="a symbolic link cannot point to"):
        files.copy(request(base, "l", file_mode=stat.S_IFLNK | 0o777, data=target), str(base))
    assert list(base.iterdir()) == []


def test_other_kinds_of_files(base: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot copy a file of mode"):
        files.copy(request(base, "f", file_mode=stat.S_IFBLK | 0o600), str(base))

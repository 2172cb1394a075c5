"""Control groups by systemd: names of units, what systemd is asked over D-Bus, what becomes of its refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from oci_engine.cgroups import systemd, systemd_bus
from oci_engine.cgroups.base import remove_cgroup
from oci_engine.cgroups.systemd import SystemdCgroup, Unit, bit_mask, quota_per_second, slice_path, unit_of
from oci_engine.cgroups.v2 import CgroupV2
from oci_engine.errors import SetupFailed, SpecError
from oci_engine.resources_spec import Cpu, Memory, Resources
from tests.support.fake_systemd import FakeSystemd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_LIMIT = 2**64 - 1


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("", Unit(name="runk-c1.scope", slice="system.slice", path="system.slice/runk-c1.scope")),
        (":cri:x", Unit(name="cri-x.scope", slice="system.slice", path="system.slice/cri-x.scope")),
        ("a-b.slice::x", Unit(name="x.scope", slice="a-b.slice", path="a.slice/a-b.slice/x.scope")),
        ("-.slice:p:x", Unit(name="p-x.scope", slice="-.slice", path="p-x.scope")),
    ],
)
def test_units(path: str, unit: Unit) -> None:
    assert unit_of(path, "c1") == unit


@pytest.mark.parametrize(
    "path", ["/a/b", "a.slice:b", "a.slice:b:", "a:b:c", "a--b.slice:p:c", ".slice:p:c", "s.slice:p:c.slice",
             "s.slice:../..:c", "s.slice:p:" + "x" * 250, "s.slice:p:a b"],
)  # fmt: skip
def test_paths_that_name_no_unit(path: str) -> None:
    with pytest.raises(SpecError, match=r"linux\.cgroupsPath"):
        unit_of(path, "c1")


def test_slices() -> None:
    assert slice_path("kubepods-burstable-podx.slice") == (
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice"
    )


@pytest.mark.parametrize(
    ("numbers", "mask"), [("0", b"\x01"), ("0-3,7", b"\x8f"), ("8", b"\x00\x01"), ("1, 3-4", b"\x1a")]
)
def test_bit_masks(numbers: str, mask: bytes) -> None:
    assert bit_mask(numbers) == mask


@pytest.mark.parametrize("numbers", ["-", "3-1", "1,", "-3", "99999"])
def test_lists_that_are_none(numbers: str) -> None:
    with pytest.raises(SpecError, match="want numbers and ranges"):
        bit_mask(numbers)


@pytest.mark.parametrize(
    ("quota", "period", "expected"), [(50_000, 100_000, 500_000), (-1, 100_000, -1), (1_111, 100_000, 20_000)]
)
def test_quotas(quota: int, period: int, expected: int) -> None:
    assert quota_per_second(quota, period) == expected


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystemd]:
    """Behind a bus; it makes the groups of its units in a folder."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
    monkeypatch.setattr(systemd_bus, "_PRIVATE", str(tmp_path / "private"))
    monkeypatch.setattr(systemd, "UNIFIED", str(tmp_path / "tree"))
    # Real files are the kernel's: what is written into them has tests of its own.
    monkeypatch.setattr(CgroupV2, "create", lambda self: None)
    monkeypatch.setattr(CgroupV2, "limit", lambda self, resources, *, devices=True: None)
    with FakeSystemd(tmp_path / "bus") as peer:
        peer.made = lambda unit: _make_group(tmp_path / "tree" / "a.slice" / unit)
        yield peer


def _make_group(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "cgroup.procs").touch()


LIMITS = Resources(
    cpu=Cpu(shares=1024, quota=50_000, period=50_000, cpus="0-1", mems="0"),
    memory=Memory(limit=1 << 20, reservation=-1, swap=3 << 20), pids_limit=9, block_weight=10,
)  # fmt: skip


def begun(place: str = "a.slice:p:c") -> SystemdCgroup:
    cgroup = SystemdCgroup(unit_of(place, "c"), description="container c")
    cgroup.create()
    cgroup.limit(LIMITS)
    return cgroup


@pytest.mark.parametrize("job_ends_first", [False, True])
def test_a_scope_begins_with_its_first_process(
    fake: FakeSystemd, tmp_path: Path, job_ends_first: bool
) -> None:
    fake.job_ends_first = job_ends_first
    cgroup = begun()
    assert fake.calls == []
    cgroup.add(1234)
    ((name, mode, properties, more),) = fake.asked("StartTransientUnit")
    assert (name, mode, more) == ("p-c.scope", "replace", [])
    assert dict(properties) == {
        "Description": ("s", "container c"), "Slice": ("s", "a.slice"), "PIDs": ("au", [1234]),
        "Delegate": ("b", True), "DefaultDependencies": ("b", False), "CollectMode": ("s", "inactive-or-failed"),
        "CPUAccounting": ("b", True), "IOAccounting": ("b", True), "MemoryAccounting": ("b", True),
        "TasksAccounting": ("b", True), "CPUWeight": ("t", 39), "CPUQuotaPerSecUSec": ("t", 1_000_000),
        "CPUQuotaPeriodUSec": ("t", 50_000), "AllowedCPUs": ("ay", b"\x03"), "AllowedMemoryNodes": ("ay", b"\x01"),
        "MemoryMax": ("t", 1 << 20), "MemoryLow": ("t", NO_LIMIT), "MemorySwapMax": ("t", 2 << 20),
        "TasksMax": ("t", 9), "IOWeight": ("t", 1),
    }  # fmt: skip
    group = tmp_path / "tree/a.slice/p-c.scope"
    assert (group / "cgroup.procs").read_text() == "1234"
    assert [name for name, _ in fake.calls] == ["Hello", "AddMatch", "Subscribe", "StartTransientUnit"]
    cgroup.add(1235)
    assert len(fake.asked("StartTransientUnit")) == 1


def test_update_and_end_of_one_that_is_known(fake: FakeSystemd, tmp_path: Path) -> None:
    _make_group(tmp_path / "tree/p-c.scope")
    (tmp_path / "tree/p-c.scope/cpu.max").write_text("30000 200000\n")
    known = SystemdCgroup(Unit(name="p-c.scope", slice="", path=""), str(tmp_path / "tree/p-c.scope"))
    known.limit(Resources(cpu=Cpu(period=100_000), pids_limit=-1))
    ((name, runtime, properties),) = fake.asked("SetUnitProperties")
    assert (name, runtime) == ("p-c.scope", True)
    assert dict(properties) == {
        "CPUQuotaPerSecUSec": ("t", 300_000), "CPUQuotaPeriodUSec": ("t", 100_000), "TasksMax": ("t", NO_LIMIT),
    }  # fmt: skip
    for file in (tmp_path / "tree/p-c.scope").iterdir():  # which a group's rmdir takes along
        file.unlink()
    known.remove()
    assert fake.asked("StopUnit") == [("p-c.scope", "replace")]
    assert not (tmp_path / "tree/p-c.scope").exists()
    known.remove()  # systemd ends an empty scope by itself
    assert len(fake.asked("StopUnit")) == 1


def test_a_group_for_a_user_is_given_when_it_is_there(
    fake: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(CgroupV2, "give_to", lambda self, uid: given.append(uid))
    cgroup = begun()
    cgroup.give_to(100_007)
    assert given == []
    cgroup.add(1234)
    assert given == [100_007]


def test_a_limit_below_what_is_used_is_not_told(fake: FakeSystemd, tmp_path: Path) -> None:
    group = tmp_path / "p-c.scope"
    _make_group(group)
    (group / "memory.current").write_text("1000\n")
    known = SystemdCgroup(Unit(name="p-c.scope", slice="", path=""), str(group))
    with pytest.raises(SetupFailed, match="999 bytes are less than the 1000 that are in use"):
        known.limit(Resources(memory=Memory(limit=999, check_before_update=True)))
    assert fake.calls == []


def test_processes_of_a_scope_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "UNIFIED", str(tmp_path))
    group = tmp_path / "a.slice/p-c.scope"
    _make_group(group)
    (group / "cgroup.kill").touch()
    remove_cgroup(begun())
    assert (group / "cgroup.kill").read_text() == ""


def test_signals_of_others_on_the_bus(fake: FakeSystemd) -> None:
    fake.stranger = True
    begun().add(1234)
    assert len(fake.asked("StartTransientUnit")) == 1


def test_one_that_systemd_has_forgotten(fake: FakeSystemd, tmp_path: Path) -> None:
    (tmp_path / "tree/x.scope").mkdir(parents=True)
    fake.refusals["StopUnit"] = (systemd_bus.NO_SUCH_UNIT, "Unit x.scope not loaded.")
    SystemdCgroup(Unit(name="x.scope", slice="", path=""), str(tmp_path / "tree/x.scope")).remove()
    assert not (tmp_path / "tree/x.scope").exists()


def test_refusals(fake: FakeSystemd) -> None:
    begun().remove()  # nothing has been made
    assert fake.calls == []
    fake.refusals["StartTransientUnit"] = (systemd_bus.UNIT_EXISTS, "Unit p-c.scope was already loaded.")
    with pytest.raises(SetupFailed, match=r"has a unit p-c\.scope already; see systemctl status p-c\.scope"):
        begun().add(1)
    fake.refusals["StartTransientUnit"] = ("org.freedesktop.DBus.Error.AccessDenied", "Permission denied")
    with pytest.raises(SetupFailed, match=r"^systemd: StartTransientUnit: Permission denied$"):
        begun().add(1)
    fake.refusals.clear()
    fake.result = "failed"
    with pytest.raises(
        SetupFailed, match=r"starting p-c\.scope: its job ended with 'failed'; see journalctl"
    ):
        begun().add(1)
    fake.result, fake.made = "done", lambda _unit: None
    with pytest.raises(
        SetupFailed, match=r"made p-c\.scope, but its group is not .*/tree/b\.slice/p-c\.scope"
    ):
        begun(place="b.slice:p:c").add(1)
    fake.silent.add("StartTransientUnit")
    with pytest.raises(SetupFailed, match="the other end closed the connection"):
        begun().add(1)


def test_systemd_itself_where_there_is_no_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeSystemd
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"tcp:host=x;unix:path={tmp_path}/none")
    with FakeSystemd(tmp_path / "private") as private, systemd_bus.Bus() as bus:
        bus.stop("x.scope")
    assert [name for name, _ in private.calls] == ["Subscribe", "StopUnit"]
    assert fake.calls == []


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS", raising=False)
    monkeypatch.setattr(systemd_bus, "_DEFAULT_BUS", f"unix:path={tmp_path}/bus")
    monkeypatch.setattr(systemd_bus, "_PRIVATE", f"{tmp_path}/private")
    with pytest.raises(SetupFailed, match=r"cannot be reached over D-Bus \(.*/bus: No such file") as caught:
        begun().add(1)
    assert "\n" not in str(caught.value)
    assert f"{tmp_path}/private: No such file or directory" in str(caught.value)

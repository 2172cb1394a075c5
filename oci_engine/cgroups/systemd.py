"""Groups that systemd makes: a scope for each container. For hosts where all groups are systemd's to give.

systemd knows the limits that it has names for, so that it does not undo them; the rest is written into the group, as
without it. A scope begins with a process in it: until the container's is there, limits wait.
"""

from __future__ import annotations

import os

from oci_engine.cgroups import files
from oci_engine.cgroups.mounted import UNIFIED
from oci_engine.cgroups.v2 import CgroupV2, io_weight_of, weight_of
from oci_engine.errors import SetupFailed, SpecError
from oci_engine.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.cgroups.systemd_bus import Property
    from oci_engine.resources_spec import Cpu, Memory, Resources

_PLACE = "linux.cgroupsPath"
_DEFAULT_SLICE, _DEFAULT_PREFIX = "system.slice", "runk"
_UNIT_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:-_.\\@")
_UNIT_LENGTH = 255
_NO_LIMIT = (1 << 64) - 1
#: systemd keeps quotas as percents of a second.
_QUOTA_STEP_US = 10_000


class Unit(Record):
    """`path` is that of its group below the top of the tree."""

    name: str
    slice: str
    path: str


def unit_of(cgroups_path: str, container_id: str) -> Unit:
    """By a path as `slice:prefix:name`; without one a scope of the id in the system's slice. Raises SpecError."""
    parts = (cgroups_path or f"{_DEFAULT_SLICE}:{_DEFAULT_PREFIX}:{container_id}").split(":")
    if len(parts) != 3 or not parts[2]:
        raise SpecError(
            _PLACE, f"want slice:prefix:name, since groups are made by systemd; got {cgroups_path!r}"
        )
    slice_, prefix, name = parts[0] or _DEFAULT_SLICE, parts[1], parts[2]
    if name.endswith(".slice"):
        raise SpecError(_PLACE, f"{name}: a container gets a scope, not a slice")
    unit = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    for each in (slice_, unit):
        if not _UNIT_CHARACTERS.issuperset(each) or len(each) > _UNIT_LENGTH:
            raise SpecError(_PLACE, f"{each!r} is no name of a unit")
    return Unit(name=unit, slice=slice_, path=f"{slice_path(slice_)}/{unit}".lstrip("/"))


def slice_path(name: str) -> str:
    """Where a slice is in the tree: a-b.slice is below a.slice. Raises SpecError."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return ""
    words = stem.split("-")
    if stem == name or not all(words):
        raise SpecError(_PLACE, f"{name!r} is no name of a slice")
    return "/".join("-".join(words[: count + 1]) + ".slice" for count in range(len(words)))


class SystemdCgroup(CgroupV2):
    """`description` is for a unit that is to be made; empty for one that exists."""

    def __init__(self, unit: Unit, path: str = "", description: str = "") -> None:
        super().__init__(path or unit.path, "" if path else UNIFIED)
        self.unit = unit
        self._description = description
        self._limits: tuple[Resources, bool] | None = None
        self._owner: int | None = None

    def create(self) -> None:
        """Nothing yet: it begins with its first process."""

    def give_to(self, uid: int) -> None:
        if self._description:
            self._owner = uid
        else:
            super().give_to(uid)

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        if self._description:
            self._limits = (resources, devices)
            return
        from oci_engine.cgroups.systemd_bus import Bus

        # systemd would set the limit at once.
        files.check_usage(resources.memory, f"{self.paths['']}/memory.current")
        with Bus() as bus:
            bus.change(self.unit.name, self._properties(resources))
        super().limit(resources, devices=devices)

    def add(self, pid: int) -> None:
        if self._description:
            self._start(pid)
        super().add(pid)

    def _start(self, pid: int) -> None:
        from oci_engine.cgroups.systemd_bus import UNIT_EXISTS, Bus, Refused

        assert self._limits is not None
        resources, devices = self._limits
        properties: list[Property] = [
            ("Description", ("s", self._description)),
            ("Slice", ("s", self.unit.slice)),
            ("PIDs", ("au", [pid])),
            ("Delegate", ("b", True)),
            ("DefaultDependencies", ("b", False)),
            # Also one that failed, as when its memory was not enough, makes room for the next of that name.
            ("CollectMode", ("s", "inactive-or-failed")),
            *((f"{each}Accounting", ("b", True)) for each in ("CPU", "IO", "Memory", "Tasks")),
            *self._properties(resources),
        ]
        with Bus() as bus:
            try:
                bus.start(self.unit.name, properties)
            except Refused as err:
                if err.name != UNIT_EXISTS:
                    raise
                raise SetupFailed(
                    f"{_PLACE}: systemd has a unit {self.unit.name} already; see systemctl status {self.unit.name}"
                ) from None
        self._description = ""
        if not os.path.isdir(self.paths[""]):
            raise SetupFailed(
                f"{_PLACE}: systemd made {self.unit.name}, but its group is not {self.paths['']}"
            )
        super().create()
        super().limit(resources, devices=devices)
        if self._owner is not None:
            super().give_to(self._owner)

    def kill(self) -> None:
        if not self._description:  # else a group of that name is somebody else's
            super().kill()

    def remove(self) -> None:
        if self._description or not os.path.isdir(self.paths[""]):
            return  # not made yet; or empty, and so systemd has ended it
        from oci_engine.cgroups.systemd_bus import NO_SUCH_UNIT, Bus, Refused

        with Bus() as bus:
            try:
                bus.stop(self.unit.name)
            except Refused as err:
                if err.name != NO_SUCH_UNIT:
                    raise
        super().remove()

    def _properties(self, resources: Resources) -> list[Property]:
        """Of the limits, those that systemd knows."""
        found = [*self._cpu_properties(resources.cpu), *self._memory_properties(resources.memory)]
        if resources.pids_limit:
            found.append(_number("TasksMax", resources.pids_limit))
        if resources.block_weight:
            found.append(_number("IOWeight", io_weight_of(resources.block_weight)))
        return found

    def _cpu_properties(self, cpu: Cpu) -> list[Property]:
        found = []
        if cpu.shares:
            found.append(_number("CPUWeight", weight_of(cpu.shares)))
        if cpu.quota or cpu.period:
            quota, period = self._quota_and_period(cpu)
            found.append(_number("CPUQuotaPerSecUSec", quota_per_second(quota, period)))
            found.append(_number("CPUQuotaPeriodUSec", period))
        for name, numbers in (("AllowedCPUs", cpu.cpus), ("AllowedMemoryNodes", cpu.mems)):
            if numbers:
                found.append((name, ("ay", bit_mask(numbers))))
        return found

    def _memory_properties(self, memory: Memory) -> list[Property]:
        found = []
        if memory.limit:
            found.append(_number("MemoryMax", memory.limit))
        if memory.reservation:
            found.append(_number("MemoryLow", memory.reservation))
        if memory.swap:
            swap = self._swap(memory)
            found.append(_number("MemorySwapMax", -1 if swap == "max" else int(swap)))
        return found


def _number(name: str, value: int) -> Property:
    """Whatever is below 0 is no limit."""
    return name, ("t", value if value >= 0 else _NO_LIMIT)


def quota_per_second(quota: int, period: int) -> int:
    """Microseconds of processor time in each second, as many as systemd is able to keep, and not fewer than asked."""
    if quota < 0:
        return -1
    exact = quota * 1_000_000 // period
    return -(-exact // _QUOTA_STEP_US) * _QUOTA_STEP_US


def bit_mask(numbers: str) -> bytes:
    """Of a list as in 0-3,7; the lowest number is the lowest bit of the first byte. Raises SpecError."""
    mask = 0
    for part in numbers.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        low, high = (int(first or -1), int(last or -1)) if dash else (int(first or -1), int(first or -1))
        if not 0 <= low <= high < 1 << 16:
            raise SpecError("linux.resources.cpu", f"want numbers and ranges as in 0-3,7, got {numbers!r}")
        mask |= (1 << high + 1) - (1 << low)
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")

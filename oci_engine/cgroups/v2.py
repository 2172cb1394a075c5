"""Version 2: one tree, in which a group has the controllers that those above it pass on."""

from __future__ import annotations

import os
import select

from oci_engine.cgroups import files
from oci_engine.cgroups.base import kill_each
from oci_engine.errors import SetupFailed
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import CgroupMount
    from oci_engine.resources_spec import Cpu, Memory, Resources, Throttle

#: What limits and statistics need; each makes every group more expensive.
_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")
#: The kernel's list of files that whoever gets a group has to own.
_DELEGATED = "/sys/kernel/cgroup/delegate"
_FREEZE_TIMEOUT_S = 10.0
_DEFAULT_PERIOD_US = 100_000
_THROTTLES = {
    "read_bps_device": "rbps", "write_bps_device": "wbps", "read_iops_device": "riops", "write_iops_device": "wiops",
}  # fmt: skip


def weight_of(shares: int) -> int:
    """cpu.weight (1 to 10000) for version 1's shares (2 to 262144)."""
    shares = min(max(shares, 2), 262_144)
    return 1 + (shares - 2) * 9999 // 262_142


def io_weight_of(weight: int) -> int:
    """io.weight (1 to 10000) for version 1's weight (10 to 1000)."""
    return 1 + (max(weight, 10) - 10) * 9999 // 990


class CgroupV2:
    """`path` is the group's below the top of the tree, which is mounted at `point`."""

    def __init__(self, path: str, point: str) -> None:
        self._point = point
        self._inner = path.strip("/")
        self._path = f"{point}/{self._inner}"
        self.paths = {"": self._path}

    def create(self) -> None:
        folder = self._point
        for name in self._inner.split("/"):
            _pass_on(folder, _CONTROLLERS)
            folder = f"{folder}/{name}"
            with suppress(FileExistsError):
                os.mkdir(folder)

    def give_to(self, uid: int) -> None:
        """Let a user of the host make groups below it, and move processes among them. The limits stay root's."""
        names = files.read(_DELEGATED).split() or ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"]
        os.chown(self._path, uid, -1)
        for name in names:
            with suppress(FileNotFoundError):  # of a controller that is not here
                os.chown(f"{self._path}/{name}", uid, -1)

    def _pass_down(self, controller: str) -> None:
        folder = self._point
        for name in self._inner.split("/"):
            _pass_on(folder, (controller,))
            folder = f"{folder}/{name}"

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        self._limit_cpu(resources.cpu)
        self._limit_memory(resources.memory)
        if resources.pids_limit:
            limit = resources.pids_limit
            self._write("pids.max", str(limit) if limit > 0 else "max", "pids.limit")
        self._limit_weights(resources)
        for each in resources.throttles:
            self._write("io.max", _throttle_line(each), f"blockIO ({each.file})")
        for size, limit in resources.hugepages:
            self._write(f"hugetlb.{size}.max", str(limit), "hugepageLimits")
        if resources.rdma:  # which few have
            self._pass_down("rdma")
        for rdma in resources.rdma:
            self._write("rdma.max", rdma.line, f"rdma[{rdma.device!r}]")
        for name, value in resources.unified:
            self._write(name, value, f"unified[{name!r}]")
        if devices:
            self._limit_devices(resources)

    def _limit_devices(self, resources: Resources) -> None:
        from oci_engine.cgroups import device_program, device_rules

        program = device_program.load(device_program.assemble(device_rules.complete(resources.devices)))
        try:
            device_program.attach(self._path, program)
        finally:
            os.close(program)

    def _write(self, file: str, value: str, place: str) -> None:
        files.write(f"{self._path}/{file}", value, f"linux.resources.{place}")

    def _limit_cpu(self, cpu: Cpu) -> None:
        if cpu.realtime_period or cpu.realtime_runtime:
            raise SetupFailed(
                "linux.resources.cpu.realtimeRuntime: version 2 of control groups has no such limit"
            )
        if cpu.shares:
            self._write("cpu.weight", str(weight_of(cpu.shares)), "cpu.shares")
        if cpu.idle is not None:
            self._write("cpu.idle", str(cpu.idle), "cpu.idle")
        if cpu.quota or cpu.period:
            quota, period = self._quota_and_period(cpu)
            self._write("cpu.max", f"{'max' if quota < 0 else quota} {period}", "cpu.quota")
        if cpu.burst is not None:
            self._write("cpu.max.burst", str(cpu.burst), "cpu.burst")
        if cpu.cpus:
            self._write("cpuset.cpus", cpu.cpus, "cpu.cpus")
        if cpu.mems:
            self._write("cpuset.mems", cpu.mems, "cpu.mems")

    def _quota_and_period(self, cpu: Cpu) -> tuple[int, int]:
        """One alone keeps the other. -1 is no quota."""
        quota, period = files.read(f"{self._path}/cpu.max").split() or ("max", _DEFAULT_PERIOD_US)
        return cpu.quota or (-1 if quota == "max" else int(quota)), cpu.period or int(period)

    def _limit_memory(self, memory: Memory) -> None:
        if memory.swappiness is not None:
            raise SetupFailed(
                "linux.resources.memory.swappiness: version 2 of control groups has no such setting"
            )
        if memory.disable_oom_killer:
            raise SetupFailed(
                "linux.resources.memory.disableOOMKiller: not possible in version 2 of control groups"
            )
        files.check_usage(memory, f"{self._path}/memory.current")
        if memory.swap:
            self._write("memory.swap.max", self._swap(memory), "memory.swap")
        if memory.limit:
            self._write("memory.max", _bytes(memory.limit), "memory.limit")
        if memory.reservation:
            self._write("memory.low", _bytes(memory.reservation), "memory.reservation")

    def _swap(self, memory: Memory) -> str:
        """Swap alone, where the specification has memory and swap together."""
        assert memory.swap is not None
        if memory.swap == -1:
            return "max"
        limit = memory.limit or files.number(f"{self._path}/memory.max")
        if limit == -1 or memory.swap < limit:
            raise SetupFailed(
                f"linux.resources.memory.swap: {memory.swap} is memory and swap together and below the limit {limit}"
            )
        return str(memory.swap - limit)

    def _limit_weights(self, resources: Resources) -> None:
        weights = [("default", resources.block_weight, "blockIO.weight")] if resources.block_weight else []
        leaf = resources.block_leaf_weight
        for index, each in enumerate(resources.block_weights):
            leaf = leaf or each.leaf_weight
            if each.weight:
                weights.append((f"{each.major}:{each.minor}", each.weight, f"blockIO.weightDevice[{index}]"))
        if leaf:
            raise SetupFailed(
                "linux.resources.blockIO.leafWeight: version 2 of control groups has no such weight"
            )
        if weights:
            bfq = os.path.exists(f"{self._path}/io.bfq.weight")
            for what, weight, place in weights:
                if bfq:
                    self._write("io.bfq.weight", f"{what} {weight}", place)
                else:
                    self._write("io.weight", f"{what} {io_weight_of(weight)}", place)

    def add(self, pid: int) -> None:
        files.write(f"{self._path}/cgroup.procs", str(pid), "linux.cgroupsPath")

    def pids(self) -> list[int]:
        return files.pids_below(self._path)

    def freeze(self, frozen: bool) -> None:
        files.write(f"{self._path}/cgroup.freeze", "1" if frozen else "0", "freezing the container")
        events = os.open(f"{self._path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while f"frozen {int(frozen)}" not in os.pread(events, 4096, 0).decode():
                if not poll.poll(_FREEZE_TIMEOUT_S * 1000):
                    if frozen:
                        files.write(f"{self._path}/cgroup.freeze", "0", "thawing the container")
                    raise SetupFailed(f"{self._path} is not frozen after {_FREEZE_TIMEOUT_S:.0f} s")
        finally:
            os.close(events)

    def is_frozen(self) -> bool:
        return files.read(f"{self._path}/cgroup.freeze") == "1"

    def kill(self) -> None:
        try:
            files.write(f"{self._path}/cgroup.kill", "1", "killing the container")
        except SetupFailed:  # before Linux 5.14, or the group is gone
            kill_each(self.pids)

    def remove(self) -> None:
        files.remove_tree(self._path)

    def mounts(self) -> tuple[CgroupMount, ...]:
        from oci_engine.plan import CgroupMount

        return (CgroupMount(name="", path=self._path),)

    def stats(self) -> dict[str, object]:
        from oci_engine.cgroups import v2_stats

        return v2_stats.read_all(self._path)


def _pass_on(folder: str, controllers: tuple[str, ...]) -> None:
    """Let the groups below have them; one that the kernel keeps back does not cost the others."""
    available = files.read(f"{folder}/cgroup.controllers").split()
    for controller in controllers:
        if controller in available:
            with suppress(SetupFailed):
                files.write(f"{folder}/cgroup.subtree_control", f"+{controller}", "linux.cgroupsPath")


def _bytes(value: int) -> str:
    return "max" if value == -1 else str(value)


def _throttle_line(each: Throttle) -> str:
    return f"{each.major}:{each.minor} {_THROTTLES[each.file]}={each.rate or 'max'}"

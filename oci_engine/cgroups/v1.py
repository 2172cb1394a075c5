"""Version 1: a tree for each controller, or for a few of them.

What only some verbs need is imported where they need it: a command line pays for each import at each call.
"""

from __future__ import annotations

import os
import time

from oci_engine.cgroups import files
from oci_engine.cgroups.base import kill_each
from oci_engine.errors import SetupFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.cgroups.mounted import Hierarchy
    from oci_engine.plan import CgroupMount
    from oci_engine.resources_spec import Cpu, Memory, Resources

# The freezer tells nobody when it is done. These are the figures that other runtimes use.
_FREEZE_LOOKS = 1000
_FREEZE_PAUSE_S = 0.01


class CgroupV1:
    """`paths` has the group's directory in the tree of each controller; `trees` may be empty for one that exists."""

    def __init__(self, paths: dict[str, str], trees: list[Hierarchy]) -> None:
        self.paths = paths
        self._trees = trees

    @classmethod
    def below(cls, path: str, trees: list[Hierarchy]) -> CgroupV1:
        """At one path in every tree: absolute from its top, or relative to the caller's own group."""
        paths: dict[str, str] = {}
        for tree in trees:
            inner = path.strip("/") if path.startswith("/") else f"{tree.own}/{path}".strip("/")
            paths |= dict.fromkeys(tree.controllers, f"{tree.point}/{inner}")
        return cls(paths, trees)

    def create(self) -> None:
        for controller, path in self.paths.items():
            os.makedirs(path, exist_ok=True)
            if controller == "cpuset":
                self._inherit_cpuset(path)

    def _inherit_cpuset(self, path: str) -> None:
        """A group whose sets are empty takes no process; new ones are."""
        point = next(tree.point for tree in self._trees if "cpuset" in tree.controllers)
        above = os.path.dirname(path)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if files.read(f"{path}/{name}"):
                continue
            if above != point and not files.read(f"{above}/{name}"):
                self._inherit_cpuset(above)
            files.write(f"{path}/{name}", files.read(f"{above}/{name}"), f"control group {path}")

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        if resources.unified:
            raise SetupFailed("linux.resources.unified: this host has version 1 of control groups")
        self._limit_cpu(resources.cpu)
        self._limit_memory(resources.memory)
        # 0 is what many callers send when they mean nothing at all.
        if resources.pids_limit:
            limit = resources.pids_limit
            self._write("pids", "pids.max", str(limit) if limit > 0 else "max", "pids.limit")
        self._limit_weights(resources)
        for each in resources.throttles:
            line = f"{each.major}:{each.minor} {each.rate}"
            self._write("blkio", f"blkio.throttle.{each.file}", line, f"blockIO ({each.file})")
        for rdma in resources.rdma:
            self._write("rdma", "rdma.max", rdma.line, f"rdma[{rdma.device!r}]")
        for size, limit in resources.hugepages:
            self._write("hugetlb", f"hugetlb.{size}.limit_in_bytes", str(limit), "hugepageLimits")
        if devices:
            from oci_engine.cgroups import device_rules

            for file, line in device_rules.v1_lines(device_rules.complete(resources.devices)):
                self._write("devices", file, line, "devices")

    def _limit_weights(self, resources: Resources) -> None:
        """By the file of the scheduler that this kernel has; leaves were the old one's alone."""
        bfq = os.path.exists(f"{self.paths.get('blkio', '')}/blkio.bfq.weight")
        weight = "blkio.bfq.weight" if bfq else "blkio.weight"
        if resources.block_weight:
            self._write("blkio", weight, str(resources.block_weight), "blockIO.weight")
        if resources.block_leaf_weight:
            self._write("blkio", "blkio.leaf_weight", str(resources.block_leaf_weight), "blockIO.leafWeight")
        for index, each in enumerate(resources.block_weights):
            place, disk = f"blockIO.weightDevice[{index}]", f"{each.major}:{each.minor}"
            if each.weight:
                self._write("blkio", f"{weight}_device", f"{disk} {each.weight}", place)
            if each.leaf_weight:
                self._write("blkio", "blkio.leaf_weight_device", f"{disk} {each.leaf_weight}", place)

    def _write(self, controller: str, file: str, value: str, place: str) -> None:
        try:
            path = self.paths[controller]
        except KeyError:
            raise SetupFailed(
                f"linux.resources.{place}: this host has no {controller} controller of control groups"
            ) from None
        files.write(f"{path}/{file}", value, f"linux.resources.{place}")

    def _limit_cpu(self, cpu: Cpu) -> None:
        if cpu.shares:
            self._write("cpu", "cpu.shares", str(cpu.shares), "cpu.shares")
        if cpu.idle is not None:
            self._write("cpu", "cpu.idle", str(cpu.idle), "cpu.idle")
        self._limit_quota(cpu)
        if cpu.burst is not None:
            self._write("cpu", "cpu.cfs_burst_us", str(cpu.burst), "cpu.burst")
        if cpu.realtime_period:
            self._write("cpu", "cpu.rt_period_us", str(cpu.realtime_period), "cpu.realtimePeriod")
        if cpu.realtime_runtime:
            self._write("cpu", "cpu.rt_runtime_us", str(cpu.realtime_runtime), "cpu.realtimeRuntime")
        if cpu.cpus:
            self._write("cpuset", "cpuset.cpus", cpu.cpus, "cpu.cpus")
        if cpu.mems:
            self._write("cpuset", "cpuset.mems", cpu.mems, "cpu.mems")

    def _limit_quota(self, cpu: Cpu) -> None:
        """The kernel looks at quota and period together, and may refuse one with the other's old value."""
        period = [("cpu.cfs_period_us", str(cpu.period), "cpu.period")] if cpu.period else []
        quota = [("cpu.cfs_quota_us", str(cpu.quota), "cpu.quota")] if cpu.quota else []
        try:
            for entry in (*period, *quota):
                self._write("cpu", *entry)
        except SetupFailed:
            if not (period and quota):
                raise
            for entry in (*quota, *period):
                self._write("cpu", *entry)

    def _limit_memory(self, memory: Memory) -> None:
        limit, swap = memory.limit, memory.swap
        files.check_usage(memory, f"{self.paths.get('memory', '')}/memory.usage_in_bytes")
        entries = []
        if limit:
            entries.append(("memory.limit_in_bytes", str(limit), "memory.limit"))
        if swap:
            entries.append(("memory.memsw.limit_in_bytes", str(swap), "memory.swap"))
        if limit and swap and self._raises_swap(swap):
            entries.reverse()  # memory alone is never allowed more than memory and swap together
        for entry in entries:
            self._write("memory", *entry)
        if memory.reservation:
            self._write("memory", "memory.soft_limit_in_bytes", str(memory.reservation), "memory.reservation")
        if memory.swappiness is not None:
            self._write("memory", "memory.swappiness", str(memory.swappiness), "memory.swappiness")
        if memory.disable_oom_killer:
            self._write("memory", "memory.oom_control", "1", "memory.disableOOMKiller")

    def _raises_swap(self, swap: int) -> bool:
        now = files.number(f"{self.paths.get('memory', '')}/memory.memsw.limit_in_bytes")
        return swap == -1 or swap > now

    def add(self, pid: int) -> None:
        for path in dict.fromkeys(self.paths.values()):
            files.write(f"{path}/cgroup.procs", str(pid), "linux.cgroupsPath")

    def pids(self) -> list[int]:
        """By the controller that is the engine's own; all trees have the same processes unless root moved some."""
        path = self.paths.get("devices") or self.paths.get("freezer") or next(iter(self.paths.values()), "")
        return files.pids_below(path)

    def freeze(self, frozen: bool) -> None:
        wanted = "FROZEN" if frozen else "THAWED"
        path = f"{self._freezer()}/freezer.state"
        for _ in range(_FREEZE_LOOKS):
            # Again at each look: a process that was being forked keeps the group from being frozen as a whole.
            files.write(path, wanted, f"{'freezing' if frozen else 'thawing'} the container")
            if files.read(path) == wanted:
                return
            time.sleep(_FREEZE_PAUSE_S)
        if frozen:
            files.write(path, "THAWED", "thawing the container")
        seconds = round(_FREEZE_LOOKS * _FREEZE_PAUSE_S)
        raise SetupFailed(f"{path} is not {wanted} after {seconds} s: a process does not stop")

    def _freezer(self) -> str:
        try:
            return self.paths["freezer"]
        except KeyError:
            raise SetupFailed("this host has no freezer controller of control groups") from None

    def is_frozen(self) -> bool:
        path = self.paths.get("freezer")
        return path is not None and files.read(f"{path}/freezer.state") in ("FROZEN", "FREEZING")

    def kill(self) -> None:
        kill_each(self.pids)
        if self.is_frozen():  # a frozen process does not even die
            self.freeze(False)

    def remove(self) -> None:
        for path in dict.fromkeys(self.paths.values()):
            files.remove_tree(path)

    def mounts(self) -> tuple[CgroupMount, ...]:
        from oci_engine.plan import CgroupMount

        found = []
        for tree in self._trees:
            first = tree.controllers[0]
            name = os.path.basename(tree.point)
            aliases = tuple(each for each in tree.controllers if each != name and "=" not in each)
            if os.path.isdir(self.paths[first]):
                found.append(CgroupMount(name=name, path=self.paths[first], aliases=aliases))
        return tuple(found)

    def stats(self) -> dict[str, object]:
        from oci_engine.cgroups import v1_stats

        return v1_stats.read_all(self.paths)

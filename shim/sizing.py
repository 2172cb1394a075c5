"""How large a sandbox's machine is while containers come, change and go.

It starts with `default_vcpus` and `default_memory`. Is that less than the limits of its containers together, with what
the guest itself needs (`overhead_vcpus`, `overhead_memory`), then it grows before a container is made or changed, and
shrinks when there is time for it: nobody waits for a guest to let go of something. A machine with
`static_sandbox_resource_mgmt` got its size before it was started (`config.sizing`), and keeps it.

The cgroups in the guest enforce the limits; a machine that cannot grow as far as they go is only slower, or has less
memory to give away, as a host would have.
"""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import structlog

from agent_proto.gen import agent_pb2
from hypervisor.errors import HotplugRefused, HypervisorError
from shim.background import Unbroken
from shim.pinning import Pinning, cpus_of
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent_proto.client import AgentClient
    from agent_proto.gen.oci_pb2 import LinuxResources
    from config import Config
    from config.schema import Qemu
    from hypervisor.qemu.machine import Machine
    from shim.background import InBackground

log = structlog.get_logger()

_MIB = 2**20
# Linux's own, where a quota comes without a period.
_PERIOD_US = 100_000
# Larger numbers are somebody's word for "no limit": the largest one there is, in whole pages or not.
_UNLIMITED_BYTES = 2**60
# Block sizes that Linux has, on any architecture.
_LEAST_BLOCK_MIB, _MOST_BLOCK_MIB = 1, 2048


class Demand(NamedTuple):
    """What one container may use: microseconds of CPU time in each period of so many, the host's CPUs that it shall run
    on, bytes of memory, and bytes by size of huge page. 0 and less is no limit."""

    quota_us: int = 0
    period_us: int = 0
    cpuset: frozenset[int] = frozenset()
    memory_bytes: int = 0
    hugepages: tuple[tuple[str, int], ...] = ()

    @property
    def vcpus(self) -> Fraction:
        return Fraction(self.quota_us, self.period_us or _PERIOD_US) if self.quota_us > 0 else Fraction(0)

    @property
    def bytes(self) -> int:
        sizes = (self.memory_bytes, *(size for _, size in self.hugepages))
        return sum(size for size in sizes if 0 < size < _UNLIMITED_BYTES)


class Size(NamedTuple):
    """Of a machine."""

    vcpus: int
    memory_mib: int


def demand_of(resources: LinuxResources, what: str, before: Demand | None = None) -> Demand:
    """What the container may use with these limits; a limit that they do not name stays as `before`.

    Raises:
        InvalidRequest: a cpuset that is none.
    """
    old, cpu, memory = before or Demand(), resources.CPU, resources.Memory
    pages = dict(old.hugepages) | {limit.Pagesize: limit.Limit for limit in resources.HugepageLimits}
    return Demand(
        quota_us=cpu.Quota or old.quota_us,
        period_us=cpu.Period or old.period_us,
        cpuset=cpus_of(cpu.Cpus, f"{what}: cpuset") or old.cpuset,
        memory_bytes=memory.Limit or old.memory_bytes,
        hugepages=tuple(sorted(pages.items())),
    )


def size_for(demands: Iterable[Demand], qemu: Qemu) -> Size:
    """The machine that containers with these limits need: CPUs by quota, and where nobody has one by the cpuset."""
    all_of_them = list(demands)
    vcpus: Fraction | int = sum(demand.vcpus for demand in all_of_them)
    if not vcpus:
        vcpus = len(frozenset[int]().union(*(demand.cpuset for demand in all_of_them)))
    memory = -(-sum(demand.bytes for demand in all_of_them) // _MIB)
    return Size(
        max(_up(_exactly(qemu.default_vcpus)), _up(_exactly(qemu.overhead_vcpus) + vcpus) if vcpus else 0),
        max(qemu.default_memory, qemu.overhead_memory + memory if memory else 0),
    )


class Sizing:
    """Keeps one machine as large as its containers' limits ask for, and its processors where they shall run."""

    def __init__(
        self, machine: Machine, agent: AgentClient, config: Config, in_background: InBackground
    ) -> None:
        self._machine = machine
        self._agent = agent
        self._qemu = config.hypervisor
        self._in_background = in_background
        self._demands: dict[str, Demand] = {}
        self._lock = asyncio.Lock()
        self._growing = Unbroken()
        self._grows = not config.runtime.static_sandbox_resource_mgmt
        self._pinning = Pinning(machine.pid) if config.runtime.enable_vcpus_pinning else None
        self._size = size_for((), self._qemu)
        self._block_mib = 0
        self._said: set[str] = set()

    def demand(self, container_id: str) -> Demand:
        """What the container may use, as far as it was told."""
        return self._demands.get(container_id, Demand())

    async def make_room(self, container_id: str, demand: Demand) -> None:
        """Take in what a container may use from now on, and have the machine grow as far as that takes.

        Raises:
            HotplugRefused: the guest does not take the memory.
            QmpError: QEMU refused, or is gone.
        """
        before = self.demand(container_id)
        self._demands[container_id] = demand
        # To the end, even when the caller goes away: QEMU is told of memory in two steps, and with only the first one
        # taken it would refuse all that comes later.
        try:
            await self._growing.run(self._grown(), "grow the machine")
        except BaseException:
            self.remember(container_id, before)
            raise

    async def _grown(self) -> None:
        async with self._lock:
            await self._grow()
            await self._pin()

    def remember(self, container_id: str, demand: Demand) -> None:
        """Take in what a container may use, which the machine has room for."""
        self._demands[container_id] = demand

    def forget(self, container_id: str) -> None:
        """The container needs nothing any more."""
        self._demands.pop(container_id, None)

    def give_back(self) -> None:
        """Begin to make the machine as small as it may be."""
        changes = self._grows and (self._growing or self._size != self._wanted())
        if self._pinning is not None or changes:
            self._in_background(self._shrink(), "shrink the machine")

    def _wanted(self) -> Size:
        return size_for(self._demands.values(), self._qemu)

    async def _grow(self) -> None:
        wanted = self._wanted()
        if not self._grows or (
            wanted.vcpus <= self._size.vcpus and wanted.memory_mib <= self._size.memory_mib
        ):
            return
        resizing = self._machine.resizing
        most = Size(resizing.most_vcpus, resizing.most_memory_mib)
        if wanted.vcpus > most.vcpus or wanted.memory_mib > most.memory_mib:
            self._say_once(
                "machine_too_small",
                wanted=wanted._asdict(),
                most=most._asdict(),
                reason="the containers' limits are more than the machine was started with room for: it is bounded by "
                "default_maxvcpus and default_maxmemory, and by its kind",
            )
        before = self._size
        try:
            await self._grow_to(Size(min(wanted.vcpus, most.vcpus), min(wanted.memory_mib, most.memory_mib)))
        finally:
            if self._size != before:
                log.info("machine_grown", **self._size._asdict())

    async def _grow_to(self, wanted: Size) -> None:
        resizing = self._machine.resizing
        if wanted.vcpus > self._size.vcpus:
            self._size = self._size._replace(vcpus=await resizing.grow_vcpus(wanted.vcpus))
        if more_memory := wanted.memory_mib > self._size.memory_mib:
            block_mib = await self._guest_block_mib()
            await resizing.grow_memory(wanted.memory_mib, block_mib)
            self._size = self._size._replace(memory_mib=await resizing.memory_mib())
        await self._online(cpu_only=not more_memory)

    async def _guest_block_mib(self) -> int:
        """The pieces that the guest takes memory in. Raises HotplugRefused when it takes none."""
        if not self._block_mib:
            details = await self._agent.get_guest_details(agent_pb2.GuestDetailsRequest(mem_block_size=True))
            mib = details.mem_block_size_bytes // _MIB
            if not _LEAST_BLOCK_MIB <= mib <= _MOST_BLOCK_MIB or mib & (mib - 1):
                raise HotplugRefused(
                    "cannot add memory: the guest's kernel has no memory hotplug; "
                    "set default_memory to what is needed, or static_sandbox_resource_mgmt"
                )
            self._block_mib = mib
        return self._block_mib

    async def _online(self, *, cpu_only: bool) -> None:
        """Have the guest use what it has got. One that does not in time goes on with what it uses."""
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=self._size.vcpus, cpu_only=cpu_only)
        try:
            await self._agent.online_cpu_mem(request)
        except RpcError as err:
            if err.code not in (Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL):
                raise
            log.warning("vcpus_not_online", wanted=self._size.vcpus, error=str(err))

    async def _shrink(self) -> None:
        async with self._lock:
            if self._grows and not self._machine.exited.done():
                try:
                    await self._shrink_to(self._wanted())
                except (HypervisorError, RpcError) as err:
                    self._say_once("machine_stays_bigger", reason=str(err))
            await self._pin()

    async def _shrink_to(self, wanted: Size) -> None:
        resizing, before = self._machine.resizing, self._size
        if wanted.memory_mib < self._size.memory_mib:
            if await resizing.shrink_memory(wanted.memory_mib, await self._guest_block_mib()):
                self._size = self._size._replace(memory_mib=wanted.memory_mib)
            else:
                self._say_once(
                    "memory_stays",
                    reason="memory modules are not taken out again; set enable_virtio_mem, or "
                    "reclaim_guest_freed_memory for a balloon",
                )
        if wanted.vcpus < self._size.vcpus:
            if why := resizing.why_vcpus_stay:
                self._say_once("vcpus_stay", reason=why)
            else:
                try:
                    await resizing.shrink_vcpus(wanted.vcpus)
                finally:
                    self._size = self._size._replace(vcpus=await resizing.vcpus())
        if self._size != before:
            log.info("machine_shrunk", **self._size._asdict())

    async def _pin(self) -> None:
        if self._pinning is not None:
            from hypervisor.qemu.commands import query_cpus_fast

            cpus = sorted(await query_cpus_fast(self._machine.monitor), key=lambda cpu: cpu.cpu_index)
            demands = self._demands.values()
            cpuset = frozenset[int]().union(*(demand.cpuset for demand in demands))
            self._pinning.apply([cpu.thread_id for cpu in cpus], cpuset)

    def _say_once(self, event: str, **values: Mapping[str, int] | str) -> None:
        if event not in self._said:
            self._said.add(event)
            log.warning(event, **values)


def _exactly(value: float) -> Fraction:
    """What the file says: 0.2 is no binary fraction, and 0.2 and 0.8 CPUs are one."""
    return Fraction(str(value))


def _up(value: Fraction) -> int:
    return -int(-value // 1)

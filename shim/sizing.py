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
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from agent_proto.gen import agent_pb2, kata_py_agent_pb2
from hypervisor.errors import HotplugRefused, HypervisorError
from shim.background import Unbroken, apart
from shim.host_cgroup import Limits
from shim.pinning import Pinning, cpus_of
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent_proto.gen.oci_pb2 import LinuxResources
    from config import Config
    from config.schema import Qemu
    from hypervisor.qemu.machine import Machine
    from shim.background import InBackground
    from shim.guest import Guest
    from shim.host_cgroup import HostCgroup

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


class Placement(NamedTuple):
    """Of a machine's processors on the host: how many are used, on which CPUs, for how much of the time, and whether
    in the pod's control group."""

    vcpus: int
    cpus: frozenset[int]
    quota_us: int
    period_us: int
    in_group: bool


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
    """Keeps one machine as large as its containers' limits ask for, and its processors where they shall run.

    Nobody waits for what another container needs, unless it is of the same kind: a container that fits into what there
    is does not wait at all. `_size` is what the machine has for certain: a processor that is about to go is not in it.
    """

    def __init__(self, machine: Machine, guest: Guest, config: Config, in_background: InBackground) -> None:
        self._machine = machine
        self._guest = guest
        self._agent = guest.agent
        self._qemu = config.hypervisor
        self._in_background = in_background
        self._demands: dict[str, Demand] = {}
        # QEMU is told of one change of a kind at a time.
        self._plugging_vcpus, self._changing_memory = asyncio.Lock(), asyncio.Lock()
        self._parking = asyncio.Lock()
        self._shrinking, self._placing = asyncio.Lock(), asyncio.Lock()
        self._growing = Unbroken()
        self._grows = not config.runtime.static_sandbox_resource_mgmt
        self._pinning = Pinning(machine.pid) if config.runtime.enable_vcpus_pinning else None
        self._group: HostCgroup | None = None
        self._group_is_for = ""
        self._placed: Placement | None = None
        self._size = size_for((), self._qemu)
        self._block_mib = 0
        self._said: set[str] = set()

    def demand(self, container_id: str) -> Demand:
        """What the container may use, as far as it was told."""
        return self._demands.get(container_id, Demand())

    async def make_room(self, container_id: str, demand: Demand) -> None:
        """Take in what a container may use from now on, and have the machine grow as far as that takes.

        Raises:
            HotplugRefused: the guest does not take it, or QEMU does not give it.
            QmpError: QEMU is gone.
        """
        before, enough = self.demand(container_id), self._wanted()
        self._demands[container_id] = demand
        try:
            # What others have asked for, they wait for.
            missing = self._missing(enough)
            if any(missing):
                # To the end, even when the caller goes away: QEMU is told of memory in two steps, and with only the
                # first one taken it would refuse all that comes later.
                await self._growing.run(self._grow(*missing), "grow the machine")
            await self._place()
        except BaseException:
            self.remember(container_id, before)
            raise

    def remember(self, container_id: str, demand: Demand) -> None:
        """Take in what a container may use, which the machine has room for."""
        self._demands[container_id] = demand

    def forget(self, container_id: str) -> None:
        """The container needs nothing any more."""
        self._demands.pop(container_id, None)

    def give_back(self) -> None:
        """Begin to make the machine as small as it may be."""
        changes = self._grows and (self._growing or self._size != self._wanted())
        if changes or (self._places and self._placed != self._placement()):
            self._in_background(self._shrink(), "shrink the machine")

    async def keep_in(self, group: HostCgroup, sandbox_id: str, pod_bytes: int) -> None:
        """Keep the processors in the pod's control group, within the limits that nobody else sets there: the CPUs of
        its containers, and the quota of a container that is its own pod, called as the sandbox. `pod_bytes` is the
        pod's memory limit."""
        most = size_for((Demand(memory_bytes=pod_bytes),), self._qemu).memory_mib if self._grows else 0
        most_mib = max(most, self._size.memory_mib)
        limit = group.memory_limit()
        if limit is not None and limit < most_mib * _MIB:
            log.warning(
                "pod_not_counted",
                reason=f"the memory limit of the pod's control group, {limit // _MIB} MiB, is less than the machine "
                f"may take, {most_mib} MiB, and would be QEMU's end: the machine stays in the group for overhead; give "
                "the pod overhead for all of it (RuntimeClass), or set sandbox_cgroup_only",
            )
            return
        self._group, self._group_is_for = group, sandbox_id
        await self._place()

    def _wanted(self) -> Size:
        return size_for(self._demands.values(), self._qemu)

    def _most(self) -> Size:
        resizing = self._machine.resizing
        return Size(resizing.most_vcpus, resizing.most_memory_mib)

    def _missing(self, enough: Size) -> tuple[bool, bool]:
        """Of which the machine has less than its containers may use, and less than `enough`: processors, memory."""
        wanted, size = self._wanted(), self._size
        vcpus, memory = max(size.vcpus, enough.vcpus), max(size.memory_mib, enough.memory_mib)
        return self._grows and wanted.vcpus > vcpus, self._grows and wanted.memory_mib > memory

    async def _grow(self, vcpus: bool, memory: bool) -> None:
        wanted, most, before = self._wanted(), self._most(), self._size
        if wanted.vcpus > most.vcpus or wanted.memory_mib > most.memory_mib:
            self._say_once(
                "machine_too_small",
                wanted=wanted._asdict(),
                most=most._asdict(),
                reason="the containers' limits are more than the machine was started with room for: it is bounded by "
                "default_maxvcpus and default_maxmemory, and by its kind",
            )
        try:
            if vcpus:
                await self._grow_vcpus(min(wanted.vcpus, most.vcpus))
            more_memory = memory and await self._grow_memory(min(wanted.memory_mib, most.memory_mib))
            if more_memory or self._size.vcpus > before.vcpus:
                await self._online(cpu_only=not more_memory)
        finally:
            if self._size != before:
                log.info("machine_grown", **self._size._asdict())

    async def _grow_vcpus(self, wanted: int) -> None:
        if wanted > self._size.vcpus:
            async with self._plugging_vcpus:
                there = await self._machine.resizing.grow_vcpus(wanted)
                self._size = self._size._replace(vcpus=max(self._size.vcpus, min(wanted, there)))

    async def _grow_memory(self, wanted_mib: int) -> bool:
        """Returns whether it had to."""
        if wanted_mib <= self._size.memory_mib:
            return False
        resizing = self._machine.resizing
        async with self._changing_memory:
            if wanted_mib <= self._size.memory_mib:
                return False  # another container's share comes on top, and brought this one's
            block_mib = await self._guest_block_mib()
            await resizing.grow_memory(wanted_mib, block_mib)
            self._size = self._size._replace(memory_mib=await resizing.memory_mib())
        return True

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
        async with self._parking:
            pass  # what the guest is being asked to park comes back after that
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=self._size.vcpus, cpu_only=cpu_only)
        try:
            await self._agent.online_cpu_mem(request)
        except RpcError as err:
            if err.code not in (Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL):
                raise
            log.warning("vcpus_not_online", wanted=self._size.vcpus, error=str(err))

    async def _shrink(self) -> None:
        async with self._shrinking:
            if self._grows and not self._machine.exited.done():
                before = self._size
                try:
                    await self._shrink_memory()
                    await self._shrink_vcpus()
                except (HypervisorError, RpcError) as err:
                    self._say_once("machine_stays_bigger", reason=str(err))
                if self._size != before:
                    log.info("machine_shrunk", **self._size._asdict())
                # A container may have come meanwhile, for which there was no other place.
                if any(missing := self._missing(self._size)):
                    await self._growing.run(self._grow_again(*missing), "grow the machine")
            await self._place()

    async def _grow_again(self, vcpus: bool, memory: bool) -> None:
        try:
            await self._grow(vcpus, memory)
        except (HypervisorError, RpcError) as err:
            log.warning("machine_too_small", wanted=self._wanted()._asdict(), reason=str(err))

    async def _shrink_memory(self) -> None:
        resizing = self._machine.resizing
        async with self._changing_memory:
            wanted_mib = self._wanted().memory_mib
            if wanted_mib >= self._size.memory_mib:
                return
            if await resizing.shrink_memory(wanted_mib, await self._guest_block_mib()):
                self._size = self._size._replace(memory_mib=wanted_mib)
            else:
                self._say_once(
                    "memory_stays",
                    reason="memory modules are not taken out again; set enable_virtio_mem, or "
                    "reclaim_guest_freed_memory for a balloon",
                )

    async def _shrink_vcpus(self) -> None:
        """One at a time: the guest may take its while, and what is wanted may be more again by then."""
        resizing = self._machine.resizing
        if why := resizing.why_vcpus_stay:
            await self._park_vcpus(why)
            return
        while self._wanted().vcpus < self._size.vcpus:
            target = self._size.vcpus - 1
            self._size = self._size._replace(vcpus=target)
            gone = False
            try:
                gone = await resizing.shrink_vcpus(target) <= target
            finally:
                if not self._machine.exited.done():
                    there = await resizing.vcpus()
                    self._size = self._size._replace(vcpus=there)
            if not gone:
                return

    async def _park_vcpus(self, why: str) -> None:
        """Processors that stay in the machine are taken from the guest's programs: then they cost the host nothing."""
        if self._wanted().vcpus >= self._size.vcpus:
            return
        if not await self._guest.extended():
            self._say_once("vcpus_stay", reason=why)
            return
        wanted, before = self._wanted().vcpus, self._size.vcpus
        # Before the guest is asked: who needs one of them from now on has it brought online again, after this.
        self._size = self._size._replace(vcpus=min(wanted, before))
        async with self._parking:
            if self._size.vcpus == wanted:
                try:
                    await self._agent.limit_processors(
                        kata_py_agent_pb2.LimitProcessorsRequest(online=wanted)
                    )
                except RpcError:  # some may be parked; who needs more has all of them brought online
                    self._size = self._size._replace(vcpus=max(before, self._size.vcpus))
                    raise

    @property
    def _places(self) -> bool:
        """Whether somebody cares where the processors run."""
        return self._pinning is not None or self._group is not None

    def _placement(self) -> Placement:
        demands = self._demands.values()
        cpus = frozenset[int]().union(*(demand.cpuset for demand in demands))
        own = self.demand(self._group_is_for)
        return Placement(self._size.vcpus, cpus, own.quota_us, own.period_us, self._group is not None)

    async def _place(self) -> None:
        """See to it that the processors' threads run where they shall: pinned, and in the pod's control group."""
        async with self._placing:
            wanted = self._placement()
            if not self._places or self._placed == wanted:
                return
            from hypervisor.qemu.commands import query_cpus_fast

            try:
                cpus = await query_cpus_fast(self._machine.monitor)
            except HypervisorError as err:
                log.warning("processors_not_placed", error=str(err))  # tried again with the next change
                return
            threads = [cpu.thread_id for cpu in sorted(cpus, key=lambda cpu: cpu.cpu_index)]
            if self._group is not None:
                await self._hold(self._group, threads, wanted)
            if self._pinning is not None:
                self._pinning.apply(threads, wanted.cpus, used=wanted.vcpus)
            self._placed = wanted

    async def _hold(self, group: HostCgroup, threads: list[int], wanted: Placement) -> None:
        limits = Limits(self._host_quota(wanted), wanted.period_us, wanted.cpus)
        try:
            await apart(partial(group.hold, self._machine.pid, threads, limits))
        except OSError as err:
            log.warning(
                "processors_not_in_the_pods_cgroup",
                cpus=sorted(wanted.cpus),
                quota_us=limits.quota_us,
                error=f"{err}; the CPUs have to be online, and among those that the group's parent has",
            )

    def _host_quota(self, wanted: Placement) -> int:
        """What the container may use, and the guest itself beside it."""
        if wanted.quota_us <= 0:
            return 0
        beside = _exactly(self._qemu.overhead_vcpus) * (wanted.period_us or _PERIOD_US)
        return wanted.quota_us + _up(beside)

    def _say_once(self, event: str, **values: Mapping[str, int] | str) -> None:
        if event not in self._said:
            self._said.add(event)
            log.warning(event, **values)


def _exactly(value: float) -> Fraction:
    """What the file says: 0.2 is no binary fraction, and 0.2 and 0.8 CPUs are one."""
    return Fraction(str(value))


def _up(value: Fraction) -> int:
    return -int(-value // 1)

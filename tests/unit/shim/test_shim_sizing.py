"""The size that a machine gets by its containers' limits, and that it follows them."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from agent_proto.gen import agent_pb2, kata_py_agent_pb2
from agent_proto.gen.oci_pb2 import LinuxCPU, LinuxHugepageLimit, LinuxMemory, LinuxResources
from config.schema import Config, Qemu, Runtime
from hypervisor.errors import HotplugRefused
from shim.errors import InvalidRequest
from shim.host_cgroup import Limits
from shim.pinning import Pinning, cpus_of
from shim.sizing import Demand, Sizing, demand_of, size_for
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Coroutine

MIB = 2**20


def cpus(quota: int, period: int = 100_000) -> Demand:
    return Demand(quota_us=quota, period_us=period)


def memory(mib: int) -> Demand:
    return Demand(memory_bytes=mib * MIB)


@pytest.mark.parametrize(
    ("demands", "changed", "size"),
    [
        ((), {}, (1, 256)),
        ((Demand(),), {"overhead_vcpus": 5.0, "overhead_memory": 500}, (1, 256)),
        ((cpus(50_000),), {}, (1, 256)),
        ((cpus(150_000), cpus(50_000)), {}, (2, 256)),
        ((cpus(150_000), cpus(60_000)), {}, (3, 256)),
        # Exact: as binary fractions these are more than one.
        ((cpus(80_000),), {"overhead_vcpus": 0.2}, (1, 256)),
        ((cpus(10_000), cpus(20_000), cpus(70_000)), {}, (1, 256)),
        ((cpus(200_000),), {"overhead_vcpus": 0.2}, (3, 256)),
        ((cpus(200_000),), {"default_vcpus": 3.5}, (4, 256)),
        ((cpus(200_000, 0),), {}, (2, 256)),
        ((cpus(-1),), {}, (1, 256)),
        ((Demand(cpuset=frozenset({0, 1})), Demand(cpuset=frozenset({1, 5}))), {}, (3, 256)),
        ((Demand(cpuset=frozenset({0, 1})), cpus(50_000)), {}, (1, 256)),
        ((memory(200), memory(100)), {}, (1, 300)),
        ((memory(200),), {}, (1, 256)),
        ((memory(200),), {"overhead_memory": 100}, (1, 300)),
        ((Demand(memory_bytes=300 * MIB + 1),), {}, (1, 301)),
        ((Demand(memory_bytes=2**63 - 4096), memory(300)), {}, (1, 300)),
        ((Demand(memory_bytes=-1),), {}, (1, 256)),
        ((Demand(memory_bytes=256 * MIB, hugepages=(("2MB", 64 * MIB), ("1GB", -1))),), {}, (1, 320)),
    ],
)
def test_size(demands: tuple[Demand, ...], changed: dict[str, Any], size: tuple[int, int]) -> None:
    qemu = msgspec.structs.replace(Qemu(), **({"default_memory": 256} | changed))
    assert size_for(demands, qemu) == size


def test_an_update_changes_what_it_names() -> None:
    first = demand_of(
        LinuxResources(
            CPU=LinuxCPU(Quota=50, Period=100, Cpus="0-1"),
            Memory=LinuxMemory(Limit=7),
            HugepageLimits=[LinuxHugepageLimit(Pagesize="2MB", Limit=1)],
        ),
        "c",
    )
    assert first == Demand(50, 100, frozenset({0, 1}), 7, (("2MB", 1),))
    assert demand_of(LinuxResources(), "c", first) == first
    changed = demand_of(
        LinuxResources(CPU=LinuxCPU(Quota=-1), HugepageLimits=[LinuxHugepageLimit(Pagesize="1GB", Limit=2)]),
        "c",
        first,
    )
    assert changed == Demand(-1, 100, frozenset({0, 1}), 7, (("1GB", 2), ("2MB", 1)))


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ()), ("0", (0,)), ("0-2,7", (0, 1, 2, 7)), (" 1 , 3-3\n", (1, 3)), ("8191", (8191,))],
)
def test_cpuset(text: str, found: tuple[int, ...]) -> None:
    assert cpus_of(text, "c") == set(found)


@pytest.mark.parametrize("text", ["a", "-1", "1-", "2-1", "0-1-2", "8192", "0-99999999999", "+1", "1 2", "٣"])
def test_a_cpuset_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"container c: cpuset: .* is no list of CPUs such as 0-3,8"):
        demand_of(LinuxResources(CPU=LinuxCPU(Cpus=text)), "container c")


class World:
    """A machine and an agent that do what they are told, and write it down."""

    pid = os.getpid()

    def __init__(self, runtime: Runtime | None = None, **qemu: Any) -> None:
        self.done: list[str] = []
        self.failure: Exception | None = None
        self.most_vcpus, self.most_memory_mib = 8, 4096
        self.there = [1, 256]
        self.why_vcpus_stay = ""
        self.extensions = False
        self.gives_memory = True
        self.block_bytes = 128 * MIB
        self.resizing = self.agent = self
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tasks: list[asyncio.Task[None]] = []
        config = Config(
            hypervisor=msgspec.structs.replace(Qemu(), **({"default_memory": 256} | qemu)),
            runtime=runtime or Runtime(),
        )
        machine: Any = self
        self.sizing = Sizing(machine, machine, config, self._in_background)

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    async def shrunk(self) -> None:
        self.sizing.give_back()
        await asyncio.gather(*self.tasks)

    def _do(self, what: str) -> None:
        self.done.append(what)
        if self.failure is not None:
            raise self.failure

    async def vcpus(self) -> int:
        return self.there[0]

    async def memory_mib(self) -> int:
        return self.there[1]

    async def grow_vcpus(self, total: int) -> int:
        self._do(f"vcpus {total}")
        self.there[0] = total
        return total

    async def shrink_vcpus(self, total: int) -> int:
        return await self.grow_vcpus(total)

    async def grow_memory(self, total_mib: int, block_mib: int) -> None:
        self._do(f"memory {total_mib} by {block_mib}")
        self.there[1] = total_mib

    async def shrink_memory(self, total_mib: int, block_mib: int) -> bool:
        if self.gives_memory:
            await self.grow_memory(total_mib, block_mib)
        return self.gives_memory

    async def get_guest_details(
        self, request: agent_pb2.GuestDetailsRequest
    ) -> agent_pb2.GuestDetailsResponse:
        assert request.mem_block_size
        return agent_pb2.GuestDetailsResponse(mem_block_size_bytes=self.block_bytes)

    async def extended(self) -> bool:
        return self.extensions

    async def limit_processors(self, request: kata_py_agent_pb2.LimitProcessorsRequest) -> None:
        self._do(f"park all but {request.online}")

    async def online_cpu_mem(self, request: agent_pb2.OnlineCPUMemRequest) -> None:
        self._do(f"online {request.nb_cpus}{' only' * request.cpu_only}")


async def test_the_machine_follows_its_containers() -> None:
    world = World()
    await world.sizing.make_room("a", Demand())
    await world.sizing.make_room("b", cpus(100_000)._replace(memory_bytes=200 * MIB))
    assert world.done == []  # it is as large from the start
    await world.sizing.make_room("c", cpus(150_000))
    await world.sizing.make_room("d", memory(300))
    assert world.done == ["vcpus 3", "online 3 only", "memory 500 by 128", "online 3"]
    world.done.clear()
    world.sizing.forget("c")
    await world.shrunk()
    assert world.done == ["vcpus 2", "vcpus 1"]  # one at a time
    world.sizing.forget("d")
    world.sizing.forget("b")
    await world.shrunk()
    assert world.done[2:] == ["memory 256 by 128"]
    await world.shrunk()
    assert world.done[3:] == []


async def test_as_much_as_there_is_room_for(capture: list[Any]) -> None:
    world = World()
    for name in "ab":
        await world.sizing.make_room(name, cpus(900_000)._replace(memory_bytes=4000 * MIB))
    assert world.done == ["vcpus 8", "memory 4000 by 128", "online 8", "memory 4096 by 128", "online 8"]
    assert [line["event"] for line in capture if line["log_level"] == "warning"] == ["machine_too_small"]


async def test_one_that_was_sized_before_the_boot_keeps_its_size() -> None:
    world = World(Runtime(static_sandbox_resource_mgmt=True))
    await world.sizing.make_room("a", cpus(900_000)._replace(memory_bytes=4000 * MIB))
    await world.shrunk()
    assert world.done == []


async def test_a_failure_to_grow_is_the_callers() -> None:
    world = World()
    world.failure = HotplugRefused("no")
    with pytest.raises(HotplugRefused):
        await world.sizing.make_room("a", cpus(200_000))
    assert world.sizing.demand("a") == Demand()
    world.failure = None
    world.block_bytes = 0
    with pytest.raises(
        HotplugRefused, match="cannot add memory: the guest's kernel has no memory hotplug; set"
    ):
        await world.sizing.make_room("a", memory(300))


async def test_who_gives_up_leaves_no_half_of_a_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    begun, go_on, grow = asyncio.Event(), asyncio.Event(), world.grow_memory

    async def slowly(total_mib: int, block_mib: int) -> None:
        begun.set()
        await go_on.wait()
        await grow(total_mib, block_mib)

    monkeypatch.setattr(world, "grow_memory", slowly)
    growing = asyncio.create_task(world.sizing.make_room("a", memory(300)))
    await begun.wait()
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    assert world.sizing.demand("a") == Demand()
    go_on.set()
    await world.shrunk()
    assert world.done == ["memory 300 by 128", "online 1", "memory 256 by 128"]


class Slow:
    """A step of the machine's that begins, and goes on when it is told to."""

    def __init__(self, world: World, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self._step = getattr(world, step)
        monkeypatch.setattr(world, step, self._slowly)

    async def _slowly(self, *arguments: Any) -> Any:
        self.begun.set()
        await self.go_on.wait()
        return await self._step(*arguments)


async def test_nobody_waits_for_what_another_container_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    slow = Slow(world, "grow_memory", monkeypatch)
    growing = asyncio.create_task(world.sizing.make_room("a", memory(300)))
    await slow.begun.wait()
    await world.sizing.make_room("b", Demand())
    await world.sizing.make_room("c", cpus(50_000))
    assert world.done == []
    await world.sizing.make_room("c", cpus(200_000))  # nor for what is of another kind
    assert world.done == ["vcpus 2", "online 2 only"]
    slow.go_on.set()
    await growing
    assert world.done[2:] == ["memory 300 by 128", "online 2"]


async def test_nobody_waits_for_a_guest_that_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    await world.sizing.make_room("a", cpus(300_000))
    world.sizing.forget("a")
    slow = Slow(world, "shrink_vcpus", monkeypatch)
    world.sizing.give_back()
    await slow.begun.wait()
    world.done.clear()
    await world.sizing.make_room("b", cpus(200_000))  # has room beside the one that is about to go
    assert world.done == []
    await world.sizing.make_room("c", cpus(100_000))
    assert world.done == ["vcpus 3", "online 3 only"]
    slow.go_on.set()
    await asyncio.gather(*world.tasks)
    # What has gone meanwhile comes back: the containers are promised three.
    assert world.done[2:] == ["vcpus 2", "vcpus 3", "online 3 only"]


async def test_two_that_need_memory_get_it_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    slow = Slow(world, "grow_memory", monkeypatch)
    first = asyncio.create_task(world.sizing.make_room("a", memory(300)))
    await slow.begun.wait()
    second = asyncio.create_task(world.sizing.make_room("b", memory(200)))
    await asyncio.sleep(0)
    slow.go_on.set()
    await asyncio.gather(first, second)
    assert [step for step in world.done if step.startswith("memory")] == [
        "memory 300 by 128",
        "memory 500 by 128",
    ]


async def test_processors_that_cannot_go_are_parked() -> None:
    world = World()
    world.why_vcpus_stay, world.extensions = "they do not", True
    for _ in range(2):
        world.done.clear()
        await world.sizing.make_room("a", cpus(300_000))
        assert world.done == ["vcpus 3", "online 3 only"]
        world.sizing.forget("a")
        await world.shrunk()
        assert world.done[2:] == ["park all but 1"]
    await world.sizing.make_room("a", cpus(200_000))
    assert world.done[-1] == "online 2 only"


async def test_a_guest_that_parks_none_keeps_them(
    capture: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that has our extensions, but an older version of them."""
    world = World()
    world.why_vcpus_stay, world.extensions = "they do not", True

    async def refused(request: object) -> None:
        raise RpcError(Code.UNIMPLEMENTED, "no such method")

    monkeypatch.setattr(world, "limit_processors", refused)
    await world.sizing.make_room("a", cpus(300_000))
    world.sizing.forget("a")
    await world.shrunk()
    assert [line["event"] for line in capture if line["log_level"] == "warning"] == ["machine_stays_bigger"]
    world.done.clear()
    await world.sizing.make_room("a", cpus(300_000))
    assert world.done == []


class Group:
    """The pod's control group on the host: what it is told."""

    def __init__(self, limit: int | None = None) -> None:
        self.told: list[Any] = []
        self.failure: OSError | None = None
        self._limit = limit

    def memory_limit(self) -> int | None:
        return self._limit

    def hold(self, qemu: int, threads: list[int], limits: Limits) -> None:
        self.told.append((threads, limits))
        if self.failure is not None:
            raise self.failure


def with_threads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's processors are threads from 100 on."""
    from hypervisor.qemu import commands

    async def all_of_them(monitor: object) -> list[Any]:
        return [SimpleNamespace(cpu_index=n, thread_id=100 + n) for n in range(world.there[0])]

    world.monitor = None  # type: ignore[attr-defined]
    monkeypatch.setattr(commands, "query_cpus_fast", all_of_them)


async def test_processors_are_kept_in_the_pods_group(monkeypatch: pytest.MonkeyPatch) -> None:
    world, group = World(overhead_vcpus=0.1), Group()
    with_threads(world, monkeypatch)
    await world.sizing.make_room("s", cpus(50_000))
    await world.sizing.keep_in(group, "s", 0)  # type: ignore[arg-type]
    assert group.told == [([100], Limits(60_000, 100_000))]
    # Of other containers only the CPUs count: a kubelet limits their pod.
    await world.sizing.make_room("b", cpus(100_000)._replace(cpuset=frozenset({1, 3})))
    assert group.told[1:] == [([100, 101], Limits(60_000, 100_000, frozenset({1, 3})))]
    await world.sizing.make_room("c", Demand())
    assert group.told[2:] == []
    world.sizing.forget("b")
    await world.shrunk()
    await world.sizing.make_room("s", cpus(-1))
    assert group.told[2:] == [([100], Limits(60_000, 100_000)), ([100], Limits(0, 100_000))]


@pytest.mark.parametrize(
    ("limit_mib", "pod_mib", "static", "kept"),
    [
        (None, 0, False, True),
        (256, 0, False, True),
        (255, 0, False, False),
        (300, 300, False, True),
        (299, 300, False, False),
        (256, 300, True, True),
    ],
)
async def test_a_group_that_would_be_the_machines_end(
    monkeypatch: pytest.MonkeyPatch,
    capture: list[Any],
    limit_mib: int | None,
    pod_mib: int,
    static: bool,
    kept: bool,
) -> None:
    world = World(Runtime(static_sandbox_resource_mgmt=static))
    group = Group(limit_mib * MIB if limit_mib else None)
    with_threads(world, monkeypatch)
    await world.sizing.keep_in(group, "s", pod_mib * MIB)  # type: ignore[arg-type]
    assert bool(group.told) == kept
    assert [line["event"] for line in capture if line["log_level"] == "warning"] == ["pod_not_counted"] * (
        not kept
    )


async def test_limits_that_the_host_refuses_fail_nothing(
    monkeypatch: pytest.MonkeyPatch, capture: list[Any]
) -> None:
    world, group = World(), Group()
    with_threads(world, monkeypatch)
    group.failure = OSError(22, "Invalid argument", "/cpuset.cpus")
    await world.sizing.keep_in(group, "s", 0)  # type: ignore[arg-type]
    assert "Invalid argument: '/cpuset.cpus'; the CPUs have to be online" in capture[-1]["error"]


async def test_processors_that_the_guest_does_not_bring_online_fail_nothing(capture: list[Any]) -> None:
    world = World()

    async def late(request: object) -> None:
        raise RpcError(Code.DEADLINE_EXCEEDED, "late")

    world.online_cpu_mem = late  # type: ignore[method-assign]
    await world.sizing.make_room("a", cpus(200_000))
    assert "vcpus_not_online" in [line["event"] for line in capture]


async def test_what_does_not_go_is_told_once(capture: list[Any]) -> None:
    world = World()
    await world.sizing.make_room("a", cpus(200_000)._replace(memory_bytes=300 * MIB))
    world.sizing.forget("a")
    world.failure = HotplugRefused("the guest keeps it")
    await world.shrunk()
    await world.shrunk()
    world.failure, world.gives_memory, world.why_vcpus_stay = None, False, "they do not"
    await world.shrunk()
    await world.shrunk()
    warnings = [line["event"] for line in capture if line["log_level"] == "warning"]
    assert warnings == ["machine_stays_bigger", "memory_stays", "vcpus_stay"]
    world.done.clear()
    await world.sizing.make_room("b", cpus(200_000)._replace(memory_bytes=300 * MIB))
    assert world.done == []  # it is as large still


async def test_threads_are_pinned_one_to_one_and_let_go_again() -> None:
    usual = os.sched_getaffinity(0)
    cpu = min(usual)
    with SimpleThread() as thread:
        pinning = Pinning(os.getpid())
        pinning.apply([thread], {cpu})
        assert allowed(thread) == {cpu}
        pinning.apply([thread], {cpu, max(usual)} if len(usual) > 1 else ())
        assert allowed(thread) == usual
        pinning.apply([thread], {cpu})
        pinning.apply([thread], ())
        assert allowed(thread) == usual
        pinning.apply([thread], {8191})  # there is no such CPU: as if nothing had been asked for
        assert allowed(thread) == usual


def allowed(thread: int) -> frozenset[int]:
    """As the kernel tells it."""
    with open(f"/proc/{thread}/status") as file:
        line = next(line for line in file if line.startswith("Cpus_allowed_list:"))
    return cpus_of(line.partition(":")[2], "status")


class SimpleThread:
    """A thread of this process that waits."""

    def __enter__(self) -> int:
        import threading

        self._end, there = threading.Event(), threading.Event()
        ids: list[int] = []

        def wait() -> None:
            ids.append(threading.get_native_id())
            there.set()
            self._end.wait()

        self._thread = threading.Thread(target=wait)
        self._thread.start()
        there.wait()
        return ids[0]

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def capture() -> Any:
    from structlog.testing import capture_logs

    with capture_logs() as lines:
        yield lines


async def test_a_machines_processors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypervisor.qemu import commands

    world = World(Runtime(enable_vcpus_pinning=True, static_sandbox_resource_mgmt=True))
    world.monitor = None  # type: ignore[attr-defined]
    usual = os.sched_getaffinity(0)
    with SimpleThread() as thread:

        async def one(monitor: object) -> list[Any]:
            return [SimpleNamespace(cpu_index=0, thread_id=thread)]

        monkeypatch.setattr(commands, "query_cpus_fast", one)
        await world.sizing.make_room("a", Demand(cpuset=frozenset({min(usual)})))
        assert allowed(thread) == {min(usual)}
        world.sizing.forget("a")
        await world.shrunk()
        assert allowed(thread) == usual

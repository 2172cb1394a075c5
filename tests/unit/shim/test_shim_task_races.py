"""Calls that overtake each other: whatever the agent is slow with, other calls get their answers, and the order of the
events stays right."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from shim.errors import NotFound
from shim.io import Stdio
from tests.support import event_order
from tests.support.bundles import make_fifos
from tests.support.stub_guest import SPEC, World
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HELD_BY = {
    "Start": ("start_container", "exec_process"), "Pause": ("pause_container",), "Resume": ("resume_container",),
    "Update": ("update_container",), "Kill": ("signal_process", "signal_container"), "Delete": ("remove_container",),
}  # fmt: skip
ANSWERS = {Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.UNAVAILABLE}
NAMES = ("", "x", "y")
STEPS = [*itertools.product(("end", "Kill", "Delete", "Start"), NAMES), ("machine ends", "")]
FIELDS: dict[str, dict[str, Any]] = {"Kill": {"signal": 9}, "Update": {"resources": {"value": b"{}"}}}


async def running() -> World:
    """A container that runs, with an exec that runs, x, and one that could, y."""
    world = World()
    world.create()
    await world.call("Start")
    for exec_id in ("x", "y"):
        await world.call("Exec", exec_id=exec_id)
    await world.call("Start", exec_id="x")
    await world.settle()
    return world


async def play(world: World, method: str, exec_id: str, steps: Sequence[tuple[str, str]]) -> None:
    """Let `steps` happen while the agent holds back its answer to `method`; then everything is ended."""

    def call(name: str, target: str) -> asyncio.Task[Code]:
        fields = {} if name in ("Pause", "Resume", "Update") else {"exec_id": target}
        return asyncio.create_task(world.code(name, **FIELDS.get(name, {}), **fields))

    held = [world.agent.hold(name) for name in HELD_BY[method]]
    calls = [call(method, exec_id), *(call("Wait", name) for name in NAMES)]
    await world.settle()
    for step, target in steps:
        if step == "end":
            world.agent.end("c", target) if ("c", target) in world.agent.ended else None
        elif step == "machine ends":
            await world.end_machine()
        else:
            calls.append(call(step, target))
        await world.settle()
    for event in held:
        event.set()
    await world.settle()
    if "c" in world.containers:
        await world.code("Kill", signal=9)
        await world.settle()
        assert await world.code("Delete") is Code.OK
        await world.settle()
    assert all(task.done() for task in calls), "a call hangs"
    assert {task.result() for task in calls} <= ANSWERS


@pytest.mark.parametrize("exec_id", NAMES)
@pytest.mark.parametrize("method", sorted(HELD_BY))
async def test_every_pair_that_can_meet(method: str, exec_id: str) -> None:
    enders = [("end", ""), ("machine ends", "")]
    for steps in [*itertools.product(STEPS), *itertools.product(enders, STEPS)]:
        world = await running()
        if method == "Resume":
            await world.call("Pause")
        try:
            await play(world, method, exec_id, steps)
            event_order.check(world.publisher.told())
        except AssertionError as err:
            raise AssertionError(f"{method} {exec_id or 'init'} meets {steps}: {err}") from err


async def test_exec_that_starts_while_the_container_ends() -> None:
    """Its start and its end are told before the container's."""
    world = await running()
    released = world.agent.hold("exec_process")
    starting = asyncio.create_task(world.code("Start", exec_id="y"))
    await world.settle()
    world.agent.end("c", status=7)
    await world.settle()
    assert world.publisher.told()[-1] == "exit x"  # killed, and the container's end is held back
    released.set()
    await world.settle()
    world.agent.end("c", "y", 137)
    await world.settle()
    assert await starting is Code.OK
    assert world.publisher.told()[-3:] == ["execstarted y", "exit y", "exit"]
    assert (await world.call("Wait")).exit_status == 7


async def test_exec_whose_start_is_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep its container from ending, and comes to nothing when the answer comes after all."""
    monkeypatch.setattr("shim.container_end._EXEC_EXITS_LIMIT_S", 0.01)
    world = await running()
    released = world.agent.hold("exec_process")
    starting = asyncio.create_task(world.code("Start", exec_id="y"))
    waiting = asyncio.create_task(world.call("Wait", exec_id="y"))
    await world.settle()
    world.agent.end("c")
    await world.call("Wait")
    await world.call("Delete")
    told = list(world.publisher.told())
    released.set()
    assert await starting is Code.FAILED_PRECONDITION
    await world.settle()
    assert world.publisher.told() == told
    assert told[-4:] == ["exit", "delete x", "delete y", "delete"]
    assert (await waiting).exit_status == 255


async def test_the_end_that_was_seen_is_told_when_the_machine_ends_before_it_could_be() -> None:
    world = await running()
    world.agent.hold("exec_process")
    starting = asyncio.create_task(world.code("Start", exec_id="y"))
    await world.settle()
    world.agent.end("c", status=7)
    await world.settle()
    await world.end_machine()
    assert (await world.call("Wait")).exit_status == 7
    assert (await world.call("Wait", exec_id="y")).exit_status == 255
    assert await starting is Code.UNAVAILABLE


async def test_the_machine_ends_while_the_output_of_a_process_that_has_ended_is_under_way() -> None:
    """How it ended is known, and told; nobody may start anything in it any more."""
    world = await running()
    world.output_settled.clear()
    world.agent.end("c", status=7)
    await world.settle()
    assert world.publisher.told()[-1] == "execstarted x"
    assert await world.code("Exec", exec_id="late") is Code.FAILED_PRECONDITION
    await world.end_machine()
    assert (await world.call("Wait")).exit_status == 7
    assert world.publisher.told()[-2:] == ["exit x", "exit"]


async def test_short_process_whose_end_is_known_before_its_start() -> None:
    world = World()
    world.create()
    released = world.agent.hold("start_container")
    starting = asyncio.create_task(world.call("Start"))
    await world.settle()
    world.agent.end("c", status=3)
    await world.settle()
    assert world.publisher.told() == ["create"]
    released.set()
    await starting
    assert (await world.call("Wait")).exit_status == 3
    assert world.publisher.told() == ["create", "start", "exit"]


async def test_start_of_an_exec_that_fails() -> None:
    """Nothing was started, so no end is told; who waits gets an answer, and only deleting is left."""
    world = await running()
    waiting = asyncio.create_task(world.call("Wait", exec_id="y"))
    await world.settle()
    world.agent.refuse("exec_process")
    assert await world.code("Start", exec_id="y") is Code.INTERNAL
    assert (await waiting).exit_status == 255
    assert await world.code("Start", exec_id="y") is Code.FAILED_PRECONDITION
    await world.call("Delete", exec_id="y")
    assert world.publisher.told()[-2:] == ["execstarted x", "delete y"]
    assert world.agent.called("signal_process") == 0


async def test_exec_that_may_run_after_a_start_without_an_answer_is_killed() -> None:
    world = await running()
    world.agent.refuse("exec_process", Code.DEADLINE_EXCEEDED)
    assert await world.code("Start", exec_id="y") is Code.DEADLINE_EXCEEDED
    (request,) = [request for name, request in world.agent.calls if name == "signal_process"]
    assert (request.exec_id, request.signal) == ("y", 9)


async def test_two_deletes_at_once() -> None:
    world = await running()
    world.agent.end("c", "x")
    await world.settle()
    world.agent.end("c")
    await world.settle()
    codes = await asyncio.gather(*(world.code("Delete") for _ in range(3)))
    assert sorted(codes) == [Code.OK, Code.NOT_FOUND, Code.NOT_FOUND]
    assert world.publisher.told().count("delete") == 1


async def test_delete_of_an_exec_and_of_its_container_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exec's deletion takes its time; when the container has gone meanwhile, the exec went with it."""
    world = await running()
    world.agent.end("c", "x")
    await world.settle()
    slow = [asyncio.Event()]
    drained = slow[0]
    exec_process = world.container("c").process("x")
    closing = exec_process.aclose

    async def slow_aclose(*, guest_alive: bool) -> None:
        if slow:
            await slow.pop().wait()
        await closing(guest_alive=guest_alive)

    monkeypatch.setattr(exec_process, "aclose", slow_aclose)
    deleting = asyncio.create_task(world.code("Delete", exec_id="x"))
    world.agent.end("c")
    await world.settle()
    await world.call("Delete")
    drained.set()
    assert await deleting is Code.NOT_FOUND
    event_order.check(world.publisher.told())
    assert world.publisher.told()[-1] == "delete"


async def test_id_that_is_used_again_while_a_second_delete_waits() -> None:
    """What the second delete was meant for is gone; the new exec of that name is not."""
    world = await running()
    world.agent.end("c", "x")
    await world.settle()
    container = world.container("c")
    old = container.process("x")
    await old.lock.acquire()
    deletes = [asyncio.create_task(container.delete_exec("x")) for _ in range(2)]
    await world.settle()
    old.lock.release()
    while "delete x" not in world.publisher.told():
        await asyncio.sleep(0)
    await container.exec("x", SPEC, Stdio())
    assert await deletes[0] is old
    with pytest.raises(NotFound):
        await deletes[1]
    assert container.process("x") is not old


async def test_a_wait_that_is_given_up_leaves_the_process_alone() -> None:
    world = await running()
    waiting = asyncio.create_task(world.call("Wait"))
    await world.settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    world.agent.end("c", status=5)
    assert (await world.call("Wait")).exit_status == 5


@pytest.mark.parametrize(
    "held", ["stats_container", "update_container", "exec_process", "pause_container", "list_processes"]
)
async def test_a_blocked_call_blocks_no_other(held: str) -> None:
    world = await running()
    world.create("other")
    verb: tuple[str, dict[str, Any]] = {
        "stats_container": ("Stats", {}), "update_container": ("Update", FIELDS["Update"]),
        "exec_process": ("Start", {"exec_id": "y"}), "pause_container": ("Pause", {}), "list_processes": ("Pids", {}),
    }[held]  # fmt: skip
    world.agent.hold(held)
    blocked = asyncio.create_task(world.code(verb[0], **verb[1]))
    await world.agent.until_called(held)
    async with asyncio.timeout(5):
        assert (await world.call("State")).status in (2, 5)
        assert (await world.call("State", exec_id="x")).status in (2, 5)
        assert (await world.call("Connect")).task_pid == 4242
        if held != "list_processes":
            await world.call("Pids")
        await world.call("ResizePty")
        await world.call("Exec", exec_id="z")
        await world.call("Kill", exec_id="x", signal=9)
        assert (await world.call("Wait", exec_id="x")).exit_status == 137
        await world.call("Delete", exec_id="x")
        await world.call("Delete", id="other")
        if held != "exec_process":  # whose end is held back for a moment
            await world.call("Kill", signal=9)
            assert (await world.call("Wait")).exit_status == 137
            await world.call("Delete")
            event_order.check(world.publisher.told())
    blocked.cancel()
    await asyncio.gather(blocked, return_exceptions=True)
    await world.end_machine()


async def test_the_guest_is_asked_to_start_a_few_execs_at_once() -> None:
    """The others wait here, where no time limit runs; the container's end ends that too."""
    world = await running()
    names = [f"e{number}" for number in range(20)]
    for name in names:
        await world.call("Exec", exec_id=name)
    asked = world.agent.called("exec_process")
    released = world.agent.hold("exec_process")
    starts = [asyncio.create_task(world.code("Start", exec_id=name)) for name in names]
    await world.settle()
    assert world.agent.called("exec_process") - asked == 8
    assert await world.code("Kill", exec_id="x", signal=15) is Code.OK
    world.agent.end("c")
    await world.settle()
    assert not any(start.done() for start in starts)  # its end is held back for the eight
    released.set()
    for _ in range(10):
        await world.settle()
    for name in names[:8]:
        world.agent.end("c", name, 137)
    for _ in range(10):
        await world.settle()
    results = [await start for start in starts]
    assert results == [Code.OK] * 8 + [Code.FAILED_PRECONDITION] * 12
    assert (await world.call("State")).status == 3
    event_order.check(world.publisher.told())


async def test_a_hundred_execs_at_once_leave_no_task_behind(tmp_path: Path) -> None:
    """Each has a stream, and somebody who waits for it; some are deleted without a start."""
    world = await running()
    before = asyncio.all_tasks()

    async def live(number: int) -> Code:
        exec_id = f"e{number}"
        streams = make_fifos(tmp_path / exec_id, "stdin", "stdout")
        await world.call("Exec", exec_id=exec_id, stdin=streams.stdin, stdout=streams.stdout)
        waiting = asyncio.create_task(world.call("Wait", exec_id=exec_id))
        if number % 10:
            await world.call("Start", exec_id=exec_id)
            world.agent.end("c", exec_id, number)
            assert (await waiting).exit_status == number
        await world.call("Delete", exec_id=exec_id)
        await waiting
        return await world.code("State", exec_id=exec_id)

    assert set(await asyncio.gather(*map(live, range(100)))) == {Code.NOT_FOUND}
    await world.settle()
    assert asyncio.all_tasks() == before
    event_order.check(world.publisher.told())


async def test_out_of_memory_comes_before_the_exit() -> None:
    """Also when the guest's own word of it is still on its way: the counters of the cgroup are asked."""
    world = await running()
    world.agent.stats.cgroup_stats.memory_stats.stats["events.oom_kill"] = 1
    world.agent.end("c", status=137)
    await world.settle()
    container = world.container("c")
    container.out_of_memory()  # the word arrives
    assert world.publisher.told()[-3:] == ["oom", "exit x", "exit"]
    await world.call("Delete")
    container.out_of_memory()
    event_order.check(world.publisher.told())


@pytest.mark.parametrize("killed", [True, False])
async def test_no_memory_was_short(killed: bool) -> None:
    world = await running()
    world.agent.refuse("stats_container", Code.UNAVAILABLE)
    if killed:
        await world.call("Kill", signal=9)
    else:
        world.agent.end("c", status=137)
    assert (await world.call("Wait")).exit_status == 137
    assert "oom" not in world.publisher.told()
    assert world.agent.called("stats_container") == (0 if killed else 1)


async def test_a_guest_without_memory_counters_is_believed_late() -> None:
    world = await running()
    world.agent.end("c", status=137)
    await world.settle()
    for _ in range(3):
        world.container("c").out_of_memory()
    assert world.publisher.told()[-2:] == ["exit", "oom"]


async def test_failure_of_a_call_whose_caller_has_left_is_told() -> None:
    world = await running()
    released = world.agent.hold("pause_container")
    call = asyncio.create_task(world.call("Pause"))
    await world.agent.until_called("pause_container")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    with capture_logs() as lines:
        world.agent.end("c")
        await world.settle()
    failures = [line for line in lines if line["event"] == "abandoned_call_failed"]
    assert [(line["log_level"], "pause" in line["verb"]) for line in failures] == [("warning", True)]
    released.set()


@pytest.mark.parametrize("turns", range(8))
async def test_end_and_the_answer_to_a_pause_at_once(turns: int) -> None:
    """The end is the last state, whatever was answered."""
    world = await running()
    released = world.agent.hold("pause_container")
    pausing = asyncio.create_task(world.code("Pause"))
    await world.agent.until_called("pause_container")
    released.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    world.container("c").guest_died()
    assert await pausing in (Code.OK, Code.FAILED_PRECONDITION)
    assert (await world.call("State")).status == 3
    event_order.check(world.publisher.told())


async def test_agent_that_refuses_does_not_end_a_pause() -> None:
    world = await running()
    world.agent.refuse("pause_container")
    with pytest.raises(RpcError, match="pause_container is refused"):
        await world.call("Pause")
    assert (await world.call("State")).status == 2

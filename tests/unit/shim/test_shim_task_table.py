"""Every method of the Task service in every state: the code of the answer. The rules are those of runc's shim, whose
refusals get here the codes that containerd's own errors have."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from shim.api.gen.runc_options_pb2 import ProcessDetails
from shim.state import State
from tests.support.stub_guest import World
from ttrpc import Code

STATES = ("unknown", "created", "running", "paused", "stopped", "deleted")
OK, GONE, WRONG, TAKEN, NOT = (
    Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.ALREADY_EXISTS, Code.UNIMPLEMENTED,
)  # fmt: skip

Table = dict[str, tuple[Code | str, ...]]
# "waits" is for an answer that comes only with the end of the process.
OF_INIT: Table = {
    "State":      (GONE, OK,      OK,      OK,      OK,    GONE),
    "Start":      (GONE, OK,      WRONG,   WRONG,   WRONG, GONE),
    "Delete":     (GONE, OK,      WRONG,   WRONG,   OK,    GONE),
    "Pids":       (GONE, OK,      OK,      OK,      OK,    GONE),
    "Pause":      (GONE, WRONG,   OK,      WRONG,   WRONG, GONE),
    "Resume":     (GONE, WRONG,   WRONG,   OK,      WRONG, GONE),
    "Checkpoint": (NOT,  NOT,     NOT,     NOT,     NOT,   NOT),
    "Kill":       (GONE, OK,      OK,      OK,      GONE,  GONE),
    "Exec":       (GONE, OK,      OK,      WRONG,   WRONG, GONE),
    "ResizePty":  (GONE, OK,      OK,      OK,      WRONG, GONE),
    "CloseIO":    (GONE, OK,      OK,      OK,      OK,    GONE),
    "Update":     (GONE, OK,      OK,      OK,      WRONG, GONE),
    "Wait":       (GONE, "waits", "waits", "waits", OK,    GONE),
    "Stats":      (GONE, OK,      OK,      OK,      OK,    GONE),
    "Connect":    (OK,   OK,      OK,      OK,      OK,    OK),
    "Shutdown":   (OK,   OK,      OK,      OK,      OK,    OK),
}  # fmt: skip
# The exec's own state; "paused" is a running one in a paused container.
OF_EXEC: Table = {
    "State":     (GONE, OK,      OK,      OK,      OK,    GONE),
    "Start":     (GONE, OK,      WRONG,   WRONG,   WRONG, GONE),
    "Delete":    (GONE, OK,      WRONG,   WRONG,   OK,    GONE),
    "Kill":      (GONE, WRONG,   OK,      OK,      GONE,  GONE),
    "Exec":      (OK,   TAKEN,   TAKEN,   TAKEN,   TAKEN, OK),
    "ResizePty": (GONE, OK,      OK,      OK,      WRONG, GONE),
    "CloseIO":   (GONE, OK,      OK,      OK,      OK,    GONE),
    "Wait":      (GONE, "waits", "waits", "waits", OK,    GONE),
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "Kill": {"signal": 15},
    "CloseIO": {"stdin": True},
    "Update": {"resources": {"value": b"{}"}},
}


def cells(table: Table) -> list[object]:
    return [
        pytest.param(method, state, answer, id=f"{method}-{state}")
        for method, answers in table.items()
        for state, answer in zip(STATES, answers, strict=True)
    ]


async def expect(world: World, method: str, answer: Code | str, **fields: Any) -> None:
    if answer != "waits":
        assert await world.code(method, **FIELDS.get(method, {}), **fields) is answer
        return
    waiting = asyncio.create_task(world.code(method, **fields))
    await world.settle()
    assert not waiting.done()
    exec_id = str(fields.get("exec_id", ""))
    if exec_id and world.container("c").process(exec_id).state is State.CREATED:
        await world.call("Delete", exec_id=exec_id)
    else:
        world.agent.end("c", exec_id)
    assert await waiting is Code.OK


@pytest.mark.parametrize(("method", "state", "answer"), cells(OF_INIT))
async def test_init(method: str, state: str, answer: Code | str) -> None:
    world = World()
    if state != "unknown":
        world.create()
    if state in ("running", "paused", "stopped"):
        await world.call("Start")
    if state == "paused":
        await world.call("Pause")
    if state == "stopped":
        world.agent.end("c")
        await world.settle()
    if state == "deleted":
        await world.call("Delete")
    fields = {"exec_id": "e"} if method == "Exec" else {}
    await expect(world, method, answer, **fields)


@pytest.mark.parametrize(("method", "state", "answer"), cells(OF_EXEC))
async def test_exec(method: str, state: str, answer: Code | str) -> None:
    world = World()
    world.create()
    await world.call("Start")
    if state != "unknown":
        await world.call("Exec", exec_id="e")
    if state in ("running", "paused", "stopped"):
        await world.call("Start", exec_id="e")
    if state == "paused":
        await world.call("Pause")
    if state == "stopped":
        world.agent.end("c", "e")
        await world.settle()
    if state == "deleted":
        await world.call("Delete", exec_id="e")
    await expect(world, method, answer, exec_id="e")


async def test_an_exec_needs_a_container_that_is_neither_paused_nor_stopped_to_start() -> None:
    world = World()
    world.create()
    await world.call("Exec", exec_id="early")
    assert await world.code("Start", exec_id="early") is OK
    assert world.container("c").process("early").state is State.RUNNING
    assert world.container("c").init.state is State.CREATED
    await world.call("Start")
    for exec_id in ("e", "f"):
        assert await world.code("Exec", exec_id=exec_id) is OK
    await world.call("Pause")
    assert await world.code("Start", exec_id="e") is WRONG
    await world.call("Resume")
    assert await world.code("Start", exec_id="e") is OK
    world.agent.end("c")
    await world.settle()
    assert await world.code("Start", exec_id="f") is WRONG


@pytest.mark.parametrize("signal", [0, 65, 2**32 - 1])
async def test_no_such_signal(signal: int) -> None:
    world = World()
    world.create()
    assert await world.code("Kill", signal=signal) is Code.INVALID_ARGUMENT
    assert world.agent.called("signal_process") == 0


async def test_exec_ids() -> None:
    world = World()
    world.create()
    await world.call("Start")
    assert await world.code("Exec") is Code.INVALID_ARGUMENT  # no id
    assert await world.code("Exec", exec_id="c") is TAKEN  # nobody could tell its exit from the container's
    for _ in range(2):  # free again after its deletion
        await world.call("Exec", exec_id="e")
        await world.call("Start", exec_id="e")
        world.agent.end("c", "e", 3)
        assert (await world.call("Wait", exec_id="e")).exit_status == 3
        assert (await world.call("Delete", exec_id="e")).exit_status == 3


async def test_state() -> None:
    world = World()
    world.create(terminal=True)
    state = await world.call("State")
    assert (state.id, state.exec_id, state.bundle, state.pid) == ("c", "", "/bundles/c", 4242)
    assert (state.stdin, state.stdout, state.stderr, state.terminal) == ("", "/out", "/err", True)
    assert (state.exit_status, state.HasField("exited_at")) == (0, False)
    await world.call("Start")
    await world.call("Exec", exec_id="e", terminal=True)
    state = await world.call("State", exec_id="e")
    assert (state.id, state.exec_id, state.pid, state.status, state.terminal) == ("c", "e", 4242, 1, True)


async def test_states_around_a_pause() -> None:
    world = World()
    world.create()
    await world.call("Start")
    await world.call("Exec", exec_id="e")
    await world.call("Start", exec_id="e")
    released = world.agent.hold("pause_container")
    pausing = asyncio.create_task(world.call("Pause"))
    await world.agent.until_called("pause_container")
    assert {(await world.call("State", exec_id=e)).status for e in ("", "e")} == {5}
    released.set()
    await pausing
    assert {(await world.call("State", exec_id=e)).status for e in ("", "e")} == {4}
    await world.call("Resume")
    assert {(await world.call("State", exec_id=e)).status for e in ("", "e")} == {2}


async def test_kill_while_paused() -> None:
    """SIGKILL ends a frozen process, as cgroup v2 has it; containerd need not resume first."""
    world = World()
    world.create()
    await world.call("Start")
    await world.call("Pause")
    await world.call("Kill", signal=9)
    assert (await world.call("Wait")).exit_status == 137
    assert (await world.call("State")).status == 3
    assert await world.code("Resume") is WRONG
    assert (await world.call("Delete")).exit_status == 137


async def test_kill_all() -> None:
    world = World()
    world.create()
    await world.call("Start")
    await world.call("Kill", signal=15, all=True)
    (request,) = [request for name, request in world.agent.calls if name == "signal_container"]
    assert (request.container_id, request.signal) == ("c", 15)
    await world.call("Kill", signal=9, all=True)  # which the plain call does as well, with every agent
    assert world.agent.called("signal_container") == world.agent.called("signal_process") == 1


async def test_kill_all_with_an_agent_that_knows_no_all() -> None:
    world = World(extensions=False)
    world.create()
    await world.call("Start")
    for exec_id in ("created", "ended", "running"):
        await world.call("Exec", exec_id=exec_id)
    for exec_id in ("ended", "running"):
        await world.call("Start", exec_id=exec_id)
    world.agent.end("c", "ended")
    await world.settle()
    await world.call("Kill", signal=15, all=True)
    requests = [request for name, request in world.agent.calls if name == "signal_process"]
    assert [(request.exec_id, request.signal) for request in requests] == [("running", 15), ("", 15)]
    assert world.agent.called("get_guest_details") == 1


async def test_kill_all_goes_on_when_an_exec_has_just_ended() -> None:
    world = World(extensions=False)
    world.create()
    await world.call("Start")
    for exec_id in ("one", "two"):
        await world.call("Exec", exec_id=exec_id)
        await world.call("Start", exec_id=exec_id)
    world.agent.refuse("signal_process")  # the first of them
    assert await world.code("Kill", signal=15, all=True) is Code.OK
    requests = [request for name, request in world.agent.calls if name == "signal_process"]
    assert [request.exec_id for request in requests] == ["one", "two", ""]


def details(reply: object) -> list[tuple[int, str]]:
    processes = reply.processes  # type: ignore[attr-defined]
    urls = {process.info.type_url for process in processes if process.HasField("info")}
    assert urls <= {"containerd.runc.v1.ProcessDetails"}
    return [(process.pid, ProcessDetails.FromString(process.info.value).exec_id) for process in processes]


async def test_pids() -> None:
    world = World()
    world.create()
    await world.call("Start")
    await world.call("Exec", exec_id="e")
    world.agent.listed = [(101, ""), (102, "e"), (103, ""), (104, "nobody's")]
    for _ in range(2):
        assert details(await world.call("Pids")) == [(101, ""), (102, "e"), (103, ""), (104, "")]
    assert world.agent.called("get_guest_details") == 1


async def test_pids_of_a_guest_that_exaggerates() -> None:
    world = World()
    world.create()
    world.agent.listed = [(number, "") for number in range(40_000)]
    assert len((await world.call("Pids")).processes) == 32768


async def test_pids_with_an_agent_that_cannot_list_them() -> None:
    world = World(extensions=False)
    world.create()
    await world.call("Start")
    await world.call("Exec", exec_id="e")
    assert details(await world.call("Pids")) == [(4242, "")]
    await world.call("Start", exec_id="e")
    assert details(await world.call("Pids")) == [(4242, ""), (4242, "e")]
    world.agent.end("c")
    await world.settle()
    assert details(await world.call("Pids")) == [(4242, "")]


async def test_pids_are_never_none() -> None:
    """containerd, when it starts, deletes a task that has no processes."""
    world = World()
    world.create()
    await world.call("Start")
    world.agent.listed = []
    assert details(await world.call("Pids")) == [(4242, "")]
    world.agent.end("c")
    await world.settle()
    assert details(await world.call("Pids")) == [(4242, "")]


async def test_pids_of_a_guest_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.container._PIDS_LIMIT_S", 0.01)
    world = World()
    world.create()
    await world.call("Start")
    hold = world.agent.hold("list_processes")
    assert details(await world.call("Pids")) == [(4242, "")]
    hold.set()


async def test_an_agent_without_guest_details_has_no_extensions() -> None:
    world = World()
    world.create()
    world.agent.refuse("get_guest_details", Code.UNIMPLEMENTED)
    assert details(await world.call("Pids")) == [(4242, "")]
    world.agent.refuse("get_guest_details", Code.UNAVAILABLE)
    assert await world.code("Pids") is Code.OK  # is not asked again


async def test_extensions_are_asked_for_again_when_there_was_no_answer() -> None:
    world = World()
    world.create()
    world.agent.listed = [(7, "")]
    world.agent.refuse("get_guest_details", Code.DEADLINE_EXCEEDED)
    assert details(await world.call("Pids")) == [(4242, "")]
    assert details(await world.call("Pids")) == [(7, "")]


@pytest.mark.parametrize("exec_id", ["", "e"])
async def test_terminal_size(exec_id: str) -> None:
    world = World()
    world.create(terminal=True)
    await world.call("Start")
    await world.call("Exec", exec_id="e", terminal=True)
    await world.call("ResizePty", exec_id=exec_id, width=80, height=25)
    if exec_id:
        assert world.agent.called("tty_win_resize") == 0  # there is none yet
        await world.call("Start", exec_id=exec_id)
    (request,) = [request for name, request in world.agent.calls if name == "tty_win_resize"]
    assert (request.exec_id, request.column, request.row) == (exec_id, 80, 25)
    assert await world.code("ResizePty", exec_id=exec_id, width=2**16, height=1) is Code.INVALID_ARGUMENT


async def test_without_a_terminal_there_is_nothing_to_resize() -> None:
    world = World()
    world.create()
    await world.call("ResizePty", width=80, height=25)
    assert world.agent.called("tty_win_resize") == 0


async def test_connect() -> None:
    world = World()
    assert (await world.call("Connect")).task_pid == 0
    world.create()
    reply = await world.call("Connect")
    assert (reply.shim_pid, reply.task_pid) == (os.getpid(), 4242)


async def test_shutdown() -> None:
    world = World()
    world.create()
    await world.call("Shutdown")
    assert world.shut_downs == 0
    await world.call("Shutdown", now=True)
    assert world.shut_downs == 1
    await world.call("Delete")
    await world.call("Shutdown")
    assert world.shut_downs == 2

"""A guest whose agent does not answer: what needs no answer works, and whoever insists on an end gets it."""

from __future__ import annotations

import asyncio
import signal
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from shim.api.gen import events_pb2
from tests.support import host
from tests.support.bundles import make_fifos, shell, spec
from tests.support.fake_containerd import task_events

if TYPE_CHECKING:
    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

SLEEP = shell("exec sleep 100")
SIGKILL = int(signal.SIGKILL)
# A millisecond on an idle host; the call that is held back would take a minute.
ANSWER_LIMIT_S = 0.5
# What is promised, for the median of so many: a host that is busy with other tests has a pause now and then.
PROMISED_S, TIMES = 0.1, 5


async def test_agent_that_answers_nothing(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    """A SIGKILL that is not acknowledged ends the machine after ten seconds, and with it everything in it."""
    app = containerd.bundle(f"{shim.id}-app", spec(SLEEP))
    await shim.create(app.name, bundle=app)
    await shim.call("Start", id=app.name)
    await shim.exec("e", SLEEP)
    await shim.call("Start", exec_id="e")
    machine = (await shim.call("State")).pid
    agent.hang("SignalProcess")
    agent.hang("Check")
    started_at = time.monotonic()
    async with asyncio.timeout(17):
        await shim.call("Kill", signal=SIGKILL)
        assert (await shim.call("Wait")).exit_status == 128 + SIGKILL
        await host.ended(machine)
    assert time.monotonic() - started_at > 9
    assert (await shim.call("Wait", exec_id="e")).exit_status == 128 + SIGKILL
    assert (await shim.call("Wait", id=app.name)).exit_status == 255
    for container_id in (shim.id, app.name):
        await shim.call("Delete", id=container_id)
    await shim.shutdown()
    events = task_events(containerd.events.items)
    assert sorted(events[-7:]) == sorted(
        [(f"/tasks/{topic}", who) for topic in ("exit", "delete") for who in ("e", shim.id, app.name)]
        + [events[-7]]
    )
    assert events.index(("/tasks/exit", "e")) < events.index(("/tasks/exit", shim.id))


@pytest.mark.parametrize("method", ["StatsContainer", "UpdateContainer", "ExecProcess", "PauseContainer"])
async def test_one_call_without_an_answer(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim, method: str
) -> None:
    other = containerd.bundle(f"{shim.id}-2", spec(SLEEP))
    await shim.create(other.name, bundle=other)
    await shim.exec("e", SLEEP)
    agent.hang(method)
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "StatsContainer": ("Stats", {}),
        "UpdateContainer": ("Update", {"resources": {"value": b"{}"}}),
        "ExecProcess": ("Start", {"exec_id": "e"}),
        "PauseContainer": ("Pause", {}),
    }
    verb, fields = calls[method]
    blocked = asyncio.create_task(shim.call(verb, **fields))
    await agent.request(method)
    for verb in ("State", "Pids", "Connect", "CloseIO", "ResizePty"):
        started_at = time.monotonic()
        await shim.call(verb)
        assert time.monotonic() - started_at < ANSWER_LIMIT_S, verb
    await shim.call("Delete", id=other.name)
    await shim.call("Kill", signal=SIGKILL)
    assert (await shim.call("Wait")).exit_status == 128 + SIGKILL
    await shim.call("Delete")
    await asyncio.gather(blocked, return_exceptions=True)


async def test_whoever_ends_a_container_does_not_wait_for_its_statistics(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim
) -> None:
    """With a `Stats` unanswered in every container of the pod."""
    apps = [containerd.bundle(f"{shim.id}-{number}", spec(SLEEP)) for number in range(TIMES)]
    for app in apps:
        await shim.create(app.name, bundle=app)
        await shim.call("Start", id=app.name)
    blocked = []
    for nth, container_id in enumerate((shim.id, *(app.name for app in apps)), start=1):
        agent.hang("StatsContainer", nth=nth)
        blocked.append(asyncio.create_task(shim.call("Stats", id=container_id)))
        await agent.request("StatsContainer", nth=nth)
    took: dict[str, list[float]] = {"State": [], "Kill": [], "Delete": []}
    for app in apps:
        for verb, fields in (("State", {}), ("Kill", {"signal": SIGKILL}), ("Delete", {})):
            started_at = time.monotonic()
            await shim.call(verb, id=app.name, **fields)
            took[verb].append(time.monotonic() - started_at)
            if verb == "Kill":
                await shim.call("Wait", id=app.name)
    assert {verb: median(times) < PROMISED_S for verb, times in took.items()} == dict.fromkeys(took, True), (
        took
    )
    assert not any(call.done() for call in blocked)
    for call in blocked:
        call.cancel()
    await asyncio.gather(*blocked, return_exceptions=True)


async def test_delete_does_not_wait_long_for_the_agent(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim
) -> None:
    """Neither for output that it does not give away nor for the container's removal."""
    app = containerd.bundle(f"{shim.id}-app", spec(SLEEP))
    stdio = make_fifos(app / "io", "stdout")
    agent.hang("ReadStdout")
    await shim.create(app.name, bundle=app, **stdio._asdict())
    await shim.call("Start", id=app.name)
    await shim.call("Kill", id=app.name, signal=SIGKILL)
    await containerd.event(events_pb2.TaskExit)
    agent.hang("RemoveContainer")
    async with asyncio.timeout(5):
        assert (await shim.call("Delete", id=app.name)).exit_status == 128 + SIGKILL
    assert (await shim.call("State")).status == 2

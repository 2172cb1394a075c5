"""containerd dies in the middle of a call: the shim finishes what it was told, and tells it when somebody listens."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support.bundles import pod, shell, spec
from tests.support.fake_containerd import task_events
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim


class Cut(NamedTuple):
    """The call that is cut off, its fields, and the agent's call in it at which that happens.

    `before` are the calls that lead there; `again` is the answer to a repetition; `told` is what is heard of the
    container in the end, with the exec's id after a colon.
    """

    before: tuple[str, ...]
    call: str
    fields: dict[str, Any]
    held: str
    again: Code
    told: str


CUTS = {
    "create": Cut((), "Create", {}, "CreateContainer", Code.ALREADY_EXISTS, "create exit"),
    "start": Cut(
        ("Create",), "Start", {}, "StartContainer", Code.FAILED_PRECONDITION, "create start exit"
    ),
    "exec": Cut(
        ("Create", "Start", "Exec"), "Start", {"exec_id": "e"}, "ExecProcess", Code.FAILED_PRECONDITION,
        "create start exec-added:e exec-started:e exit:e exit",
    ),
    "kill": Cut(
        ("Create", "Start"), "Kill", {"signal": signal.SIGKILL}, "SignalProcess", Code.NOT_FOUND, "create start exit"
    ),
    "delete": Cut(
        ("Create", "Start", "Kill"), "Delete", {}, "RemoveContainer", Code.NOT_FOUND, "create start exit delete"
    ),
}  # fmt: skip


async def call(shim: Shim, verb: str, app: str, **fields: Any) -> None:
    if verb == "Create":
        await shim.create(app, bundle=shim.bundle.parent / app)
    elif verb == "Exec":
        await shim.exec("e", shell("exec sleep 100"), id=app)
    else:
        await shim.call(verb, id=app, **({"signal": signal.SIGKILL} if verb == "Kill" else fields))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
async def test_containerd_dies_in_a_call(
    containerd: FakeContainerd, agent: FakeAgent, name: str, cut: Cut
) -> None:
    app, sleeper = f"{name}-app", shell("exec sleep 100")
    bundle = containerd.bundle(name, spec(sleeper, annotations=pod("sandbox", name)))
    containerd.bundle(app, spec(sleeper, annotations=pod("container", name)))
    shim = await containerd.start(name, bundle)
    await shim.create()
    await shim.call("Start")
    for verb in cut.before:
        await call(shim, verb, app)
    # Each of these calls leads to one event. The answer to none is cut off as well: it would have to be sent again.
    await containerd.events.until(lambda items: len(items) == 2 + len(cut.before))
    nth = sum(request.method == cut.held for request in agent.requests.items) + 1
    released = agent.hang(cut.held, nth=nth)
    calling = asyncio.create_task(call(shim, cut.call, app, **cut.fields))
    await agent.request(cut.held, nth=nth)
    await containerd.stop_events()
    await shim.client.aclose()
    with pytest.raises(RpcError):
        await calling
    released.set()
    again = await containerd.connect(name, bundle, shim.address)
    if cut.call == "Kill":
        await again.call("Wait", id=app)
    # Answered when the first call is through: the verbs of a container exclude each other.
    with pytest.raises(RpcError) as caught:
        await call(again, cut.call, app, **cut.fields)
    assert caught.value.code is cut.again
    containerd.serve_events()
    await again.shutdown(now=True)
    heard = [(topic, what) for topic, what in task_events(containerd.events.items) if what != name]
    assert Counter(heard) == Counter(
        (f"/tasks/{topic}", what or app)
        for topic, _, what in (word.partition(":") for word in cut.told.split())
    )

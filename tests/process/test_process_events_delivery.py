"""Events when containerd is not there: none lost, none twice, none out of order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.bundles import shell, spec
from tests.support.fake_containerd import task_events
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from tests.support.fake_containerd import FakeContainerd, Shim


async def test_containerd_goes_away_and_comes_back(containerd: FakeContainerd, name: str) -> None:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create()
    await containerd.events.until(lambda items: len(items) == 1)
    await containerd.stop_events()
    await shim.call("Start")
    for number in range(3):
        await shim.exec(f"e{number}", shell(f"exit {number}"))
        await shim.call("Start", exec_id=f"e{number}")
        await shim.call("Wait", exec_id=f"e{number}")
    containerd.serve_events()
    events = await containerd.events.until(lambda items: len(items) >= 11)
    expected = [("/tasks/create", name), ("/tasks/start", name)]
    for number in range(3):
        expected += [(f"/tasks/{topic}", f"e{number}") for topic in ("exec-added", "exec-started", "exit")]
    assert task_events(events) == expected


async def life_of_an_exec(shim: Shim) -> list[tuple[str, str]]:
    """Create, start, and a short exec; returns the events that this makes."""
    await shim.create()
    await shim.call("Start")
    await shim.exec("e", shell("exit 3"))
    await shim.call("Start", exec_id="e")
    assert (await shim.call("Wait", exec_id="e")).exit_status == 3
    await shim.call("Delete", exec_id="e")
    of_exec = [(f"/tasks/{topic}", "e") for topic in ("exec-added", "exec-started", "exit", "delete")]
    return [("/tasks/create", shim.id), ("/tasks/start", shim.id), *of_exec]


async def test_containerd_stands_still(containerd: FakeContainerd, name: str) -> None:
    """It has taken the connection and answers nothing: calls work, and when it goes on it gets each event once."""
    containerd.take_events.clear()
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    expected = await life_of_an_exec(shim)
    assert containerd.events.items == []
    containerd.take_events.set()
    assert task_events(await containerd.events.until(lambda items: len(items) >= 6)) == expected


async def test_containerd_answers_errors(containerd: FakeContainerd, name: str) -> None:
    containerd.refuse_events = [
        RpcError(Code.UNAVAILABLE, "not yet"), RpcError(Code.UNKNOWN, "?"), RpcError(Code.CANCELLED, "stopping"),
    ]  # fmt: skip
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    expected = await life_of_an_exec(shim)
    assert task_events(await containerd.events.until(lambda items: len(items) >= 6)) == expected


async def test_connection_is_reset_in_the_middle(containerd: FakeContainerd, name: str) -> None:
    """An event that nobody knows the fate of comes again; none is lost, and the order stays."""
    containerd.take_events.clear()
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    expected = await life_of_an_exec(shim)
    for count in (1, 2):
        await containerd.offered_events.until(lambda items, count=count: len(items) == count)  # type: ignore[misc]
        await containerd.stop_events()
        containerd.serve_events()
    containerd.take_events.set()
    assert task_events(await containerd.events.until(lambda items: len(items) >= 6)) == expected


async def test_shutdown_while_containerd_is_away(containerd: FakeContainerd, name: str) -> None:
    """What cannot be told any more does not keep the shim alive."""
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await containerd.stop_events()
    await shim.create()
    await shim.shutdown(now=True)


async def test_last_events_are_out_before_the_end(containerd: FakeContainerd, name: str) -> None:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create()
    await shim.call("Start")
    await shim.shutdown(now=True)
    topics = [event.topic for event in containerd.events.items]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit"]

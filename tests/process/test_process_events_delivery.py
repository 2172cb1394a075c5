"""Events when containerd is not there: none lost, none twice, none out of order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.bundles import shell, spec
from tests.support.fake_containerd import task_events

if TYPE_CHECKING:
    from tests.support.fake_containerd import FakeContainerd


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

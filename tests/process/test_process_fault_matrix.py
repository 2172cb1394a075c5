"""Every part of a pod of two containers dies in every state of the second one: nothing is left, all is told once.

What a user would do next follows each death. In the states, one call of the agent is held, so that the death comes
in the middle of it: `Create`, nothing, nothing, the start of an exec, `Kill`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from config.validate import VIRTIOFSD_PLACES
from shim.api.gen import events_pb2
from tests.support import host
from tests.support.bundles import pod, shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

STATES = ("creating", "created", "running", "exec in flight", "stopping")
# containerd gives `delete` five seconds.
DELETE_LIMIT_S = 4.5
EXIT_LIMIT_S = 4.0

in_all_states = pytest.mark.parametrize("state", STATES)


@pytest.fixture
def config(config: Path) -> Path:
    """With a real virtiofsd, which needs no guest."""
    if not any(os.access(place, os.X_OK) for place in VIRTIOFSD_PLACES):
        pytest.skip(f"needs virtiofsd at {' or '.join(VIRTIOFSD_PLACES)}")
    config.write_text(config.read_text().replace('shared_fs = "none"', 'shared_fs = "virtio-fs"'))
    return config


@dataclass
class Pod:
    """The shim, its second container, and the calls that somebody waits for."""

    shim: Shim
    app: str
    app_bundle: Path
    calls: list[asyncio.Task[Any]] = field(default_factory=list)

    def begin(self, call: Coroutine[Any, Any, Any]) -> None:
        """Start a call that will not be answered before something dies."""
        self.calls.append(asyncio.create_task(call))

    async def refusals(self) -> None:
        """All of the calls fail with one line each."""
        async with asyncio.timeout(EXIT_LIMIT_S):
            for outcome in await asyncio.gather(*self.calls, return_exceptions=True):
                assert isinstance(outcome, RpcError)
                assert "\n" not in outcome.message


async def pod_in(containerd: FakeContainerd, agent: FakeAgent, name: str, state: str) -> Pod:
    """A pod whose sandbox container runs, and whose second one is in a state."""
    app = f"{name}-app"
    sleeper = shell("trap '' TERM; exec sleep 100")
    sandbox_bundle = containerd.bundle(name, spec(sleeper, annotations=pod("sandbox", name)))
    app_bundle = containerd.bundle(app, spec(sleeper, annotations=pod("container", name)))
    shim = await containerd.start(name, sandbox_bundle)
    found = Pod(shim, app, app_bundle)
    await shim.create()
    await shim.call("Start")
    reached = STATES.index(state)
    if reached == 0:
        agent.hang("CreateContainer", nth=2)
        found.begin(shim.create(app, bundle=app_bundle))
        await agent.request("CreateContainer", nth=2)
        return found
    await shim.create(app, bundle=app_bundle)
    if reached >= 2:
        await shim.call("Start", id=app)
    if state == "exec in flight":
        agent.hang("ExecProcess")
        await shim.exec("e", shell("exec sleep 100"), id=app)
        found.begin(shim.call("Start", id=app, exec_id="e"))
        await agent.request("ExecProcess")
    elif state == "stopping":
        agent.hang("SignalProcess")
        found.begin(shim.call("Kill", id=app, signal=signal.SIGTERM))
        await agent.request("SignalProcess")
    return found


def heard_by(containerd: FakeContainerd) -> Counter[tuple[str, str]]:
    """Topic and process of all events: an exec's id, or its container's for an init."""
    bodies = [(event.topic, event.body) for event in containerd.events.items]
    return Counter(
        (topic, getattr(body, "id", "") or getattr(body, "exec_id", "") or body.container_id)
        for topic, body in bodies
    )


def expected_events(name: str, app: str, state: str, *, deleted: bool) -> Counter[tuple[str, str]]:
    """Everything that containerd has to hear, once."""
    topics = [("create", name), ("start", name), ("exit", name)]
    if state != "creating":
        topics += [("create", app), ("exit", app)]
    if state not in ("creating", "created"):
        topics.append(("start", app))
    if state == "exec in flight":
        topics.append(("exec-added", "e"))
    if deleted:
        topics += [("delete", what) for topic, what in topics if topic in ("create", "exec-added")]
    return Counter((f"/tasks/{topic}", what) for topic, what in topics)


async def die(part: str, found: Pod, agent: FakeAgent) -> None:
    """End one part of the sandbox as a crash does. No connection to the agent outlives the machine."""
    if part != "agent":
        vm = host.helper(found.shim.pid, "qemu")
        os.kill(host.helper(found.shim.pid, part), signal.SIGKILL)
        await host.ended(vm)
    await agent.die()


@in_all_states
@pytest.mark.parametrize("part", ["qemu", "virtiofsd", "agent"])
async def test_a_part_dies(
    containerd: FakeContainerd, agent: FakeAgent, name: str, part: str, state: str
) -> None:
    found = await pod_in(containerd, agent, name, state)
    shim, app = found.shim, found.app
    died_at = time.monotonic()
    await die(part, found, agent)
    await found.refusals()
    async with asyncio.timeout(EXIT_LIMIT_S):
        ended = [name] if state == "creating" else [name, app]
        for container in ended:
            assert (await shim.call("Wait", id=container)).exit_status == 255
    assert time.monotonic() - died_at < EXIT_LIMIT_S
    for container in reversed(ended):
        assert (await shim.call("Delete", id=container)).exit_status == 255
    await shim.shutdown()
    heard = heard_by(containerd)
    assert heard == expected_events(name, app, state, deleted=True)


@pytest.mark.parametrize("part", ["qemu", "virtiofsd", "agent"])
async def test_a_part_dies_in_a_delete(
    containerd: FakeContainerd, agent: FakeAgent, name: str, part: str
) -> None:
    """The container has ended and been told so: its deletion succeeds, with its own status."""
    found = await pod_in(containerd, agent, name, "running")
    shim, app = found.shim, found.app
    await shim.call("Kill", id=app, signal=signal.SIGKILL)
    await shim.call("Wait", id=app)
    agent.hang("RemoveContainer")
    deleting = asyncio.create_task(shim.call("Delete", id=app))
    await agent.request("RemoveContainer")
    await die(part, found, agent)
    async with asyncio.timeout(EXIT_LIMIT_S):
        assert (await deleting).exit_status == 137
        assert (await shim.call("Wait")).exit_status == 255
    assert (await shim.call("Delete")).exit_status == 255
    await shim.shutdown()
    assert heard_by(containerd) == expected_events(name, app, "running", deleted=True)


@in_all_states
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_the_shim_is_told_to_end(
    containerd: FakeContainerd, agent: FakeAgent, name: str, number: signal.Signals, state: str
) -> None:
    found = await pod_in(containerd, agent, name, state)
    os.kill(found.shim.pid, number)
    await found.refusals()
    await host.ended(found.shim.pid)
    heard = heard_by(containerd)
    assert heard == expected_events(name, found.app, state, deleted=False)
    ends = [event.body for event in containerd.events.items if isinstance(event.body, events_pb2.TaskExit)]
    assert {end.exit_status for end in ends} == {255}


@in_all_states
async def test_the_shim_dies(
    containerd: FakeContainerd, agent: FakeAgent, name: str, state: str, host_watch: host.HostWatch
) -> None:
    """No call of ours ends its helpers; what is on disk waits for `delete`, however often that runs."""
    found = await pod_in(containerd, agent, name, state)
    shim = found.shim
    helpers = host.descendants(shim.pid)
    assert len(helpers) == 2
    os.kill(shim.pid, signal.SIGKILL)
    async with asyncio.timeout(EXIT_LIMIT_S):
        for pid in (shim.pid, *helpers):
            await host.ended(pid)
    await found.refusals()
    left = [line for line in host_watch.leftovers() if "sleep 100" not in line]
    assert [line for line in left if not line.startswith("control group ")] == [
        f"path {host.RUN_ROOT / name}",
        f"path {host.SHARED_ROOT / name}",
        f"path {containerd.socket_of(name)}",
    ]
    started_at = time.monotonic()
    # Its own does not touch the sandbox, which has no shim any more.
    assert (await containerd.delete(found.app, found.app_bundle)).exit_status == 137
    answers = await asyncio.gather(*(containerd.delete(name, shim.bundle) for _ in range(3)))
    assert {answer.exit_status for answer in answers} == {137}
    assert time.monotonic() - started_at < DELETE_LIMIT_S
    assert [line for line in host_watch.leftovers() if "sleep 100" not in line] == []
    assert (await containerd.delete(name, shim.bundle)).exit_status == 137
    heard = heard_by(containerd)
    assert heard == expected_events(name, found.app, state, deleted=False) - Counter(
        {("/tasks/exit", name): 1, ("/tasks/exit", found.app): 1}
    )


@in_all_states
async def test_delete_of_a_shim_that_hangs(
    containerd: FakeContainerd, agent: FakeAgent, name: str, state: str, host_watch: host.HostWatch
) -> None:
    found = await pod_in(containerd, agent, name, state)
    helpers = host.descendants(found.shim.pid)
    os.kill(found.shim.pid, signal.SIGSTOP)
    started_at = time.monotonic()
    answers = await asyncio.gather(*(containerd.delete(name, found.shim.bundle) for _ in range(3)))
    assert {answer.exit_status for answer in answers} == {137}
    assert time.monotonic() - started_at < DELETE_LIMIT_S
    async with asyncio.timeout(EXIT_LIMIT_S):
        for pid in (found.shim.pid, *helpers):
            await host.ended(pid)
    await found.refusals()
    assert [line for line in host_watch.leftovers() if "sleep 100" not in line] == []


async def test_delete_of_one_container_leaves_the_pod_alone(
    containerd: FakeContainerd, agent: FakeAgent, name: str
) -> None:
    found = await pod_in(containerd, agent, name, "running")
    (found.app_bundle / "address").write_text(found.shim.address)
    for _ in range(2):
        assert (await containerd.delete(found.app, found.app_bundle)).exit_status == 137
    for container in (name, found.app):
        assert (await found.shim.call("State", id=container)).status == 2
    with pytest.raises(RpcError) as caught:
        await found.shim.call("Delete", id=found.app)
    assert caught.value.code is Code.FAILED_PRECONDITION

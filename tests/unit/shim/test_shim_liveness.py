"""When a guest that keeps a SIGKILL from its container is ended, and when not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest
from structlog.testing import capture_logs

from shim.liveness import Liveness
from tests.support import event_order
from tests.support.stub_guest import World
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent_proto.client import AgentClient

GRACE_S = 0.05


async def world_with_short_grace(*, ends: bool = True, check_s: float = GRACE_S) -> World:
    world = World()
    agent = cast("AgentClient", world.agent)
    end = world.end_machine if ends else None
    world.guest.liveness = Liveness(agent, end, grace_s=GRACE_S, check_s=check_s)
    for container_id in ("c", "other"):
        world.create(container_id)
        await world.call("Start", id=container_id)
    await world.call("Exec", exec_id="e")
    await world.call("Start", exec_id="e")
    await world.settle()
    return world


async def test_agent_that_acknowledges_is_asked_nothing() -> None:
    world = await world_with_short_grace()
    await world.call("Kill", signal=9)
    assert (await world.call("Wait")).exit_status == 137
    assert world.agent.called("check") == 0


async def test_agent_that_answers_nothing_loses_its_machine() -> None:
    world = await world_with_short_grace()
    world.agent.hold("signal_process")
    world.agent.hold("check")
    with capture_logs() as lines:
        await world.call("Kill", signal=9)
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert (line["event"], line["container"]) == ("guest_given_up", "c")
    # What was to be killed is, as far as anybody can tell; how the others ended nobody knows.
    assert (await world.call("Wait")).exit_status == 137
    assert (await world.call("Wait", exec_id="e")).exit_status == 137
    assert (await world.call("Wait", id="other")).exit_status == 255
    await world.settle()
    for container_id in ("c", "other"):
        await world.call("Delete", id=container_id)
        event_order.check(world.publisher.told(container_id))
    assert world.publisher.told()[-4:] == ["exit e", "exit", "delete e", "delete"]
    assert world.agent.called("remove_container") == 0


@pytest.mark.parametrize("refused", [False, True])
async def test_agent_that_is_only_slow_keeps_its_machine(refused: bool) -> None:
    """Any answer to the health check is one."""
    world = await world_with_short_grace()
    released = world.agent.hold("signal_process")
    if refused:
        world.agent.refuse("check", Code.UNAVAILABLE)
    killing = asyncio.create_task(world.call("Kill", signal=9))
    await world.agent.until_called("check")
    await asyncio.wait([killing], timeout=2 * GRACE_S)
    assert not killing.done()
    assert not world.agent.gone.is_set()
    released.set()
    await killing
    assert (await world.call("Wait")).exit_status == 137
    assert (await world.call("State", id="other")).status == 2


async def test_acknowledgement_that_comes_while_the_agent_is_asked() -> None:
    world = await world_with_short_grace()
    released = world.agent.hold("signal_process")
    world.agent.hold("check")
    killing = asyncio.create_task(world.call("Kill", signal=9))
    await world.agent.until_called("check")
    released.set()
    await killing
    assert not world.agent.gone.is_set()


async def test_machine_to_be_kept_is_kept() -> None:
    world = await world_with_short_grace(ends=False)
    released = world.agent.hold("signal_process")
    world.agent.hold("check")
    with capture_logs() as lines:
        killing = asyncio.create_task(world.call("Kill", signal=9))
        await asyncio.wait([killing], timeout=6 * GRACE_S)
    assert not killing.done()
    assert not world.agent.gone.is_set()
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["guest_kept"]
    released.set()
    await killing
    assert (await world.call("Wait")).exit_status == 137


async def test_the_health_check_has_a_time_of_its_own() -> None:
    world = await world_with_short_grace(check_s=100)
    released = world.agent.hold("signal_process")
    world.agent.hold("check")
    killing = asyncio.create_task(world.call("Kill", signal=9))
    await world.agent.until_called("check")
    await asyncio.wait([killing], timeout=6 * GRACE_S)
    assert not killing.done()
    assert not world.agent.gone.is_set()
    released.set()
    await killing


async def test_other_signals_end_no_machine() -> None:
    world = await world_with_short_grace()
    world.agent.hold("signal_process")
    killing = asyncio.create_task(world.call("Kill", signal=15))
    await asyncio.wait([killing], timeout=4 * GRACE_S)
    assert not killing.done()
    assert world.agent.called("check") == 0
    await world.end_machine()
    with pytest.raises(RpcError):
        await killing


async def test_refusal_is_passed_on() -> None:
    world = await world_with_short_grace()
    world.agent.refuse("signal_process", Code.NOT_FOUND)
    assert await world.code("Kill", signal=9) is Code.NOT_FOUND


async def test_kill_goes_on_when_its_caller_leaves() -> None:
    world = await world_with_short_grace()
    world.agent.hold("signal_process")
    world.agent.hold("check")
    killing = asyncio.create_task(world.call("Kill", signal=9))
    await world.agent.until_called("signal_process")
    killing.cancel()
    assert (await world.call("Wait")).exit_status == 137

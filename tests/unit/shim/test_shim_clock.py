"""When the guest is told the time, and by what the host's clock being set is noticed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import clock
from shim.clock import GuestClock, HostClockSteps
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from agent_proto.gen.agent_pb2 import SetGuestDateTimeRequest


class Steps:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.fd, self._set = os.pipe()
        self.closed = False

    def step(self) -> None:
        os.write(self._set, b"x")

    def happened(self) -> bool:
        return bool(os.read(self.fd, 8))

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._set)
        self.closed = True


class Agent:
    """Takes the time; `answer` may take its own, or fail."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[float] = asyncio.Queue()
        self.answer: Callable[[], None] = lambda: None

    async def set_guest_date_time(self, request: SetGuestDateTimeRequest) -> None:
        self.told.put_nowait(request.Sec + request.Usec / 1e6)
        self.answer()


async def test_at_once_when_asked_and_at_every_step_of_the_hosts_clock() -> None:
    agent, steps = Agent(), Steps()
    stand_in: Any = agent
    ours = GuestClock(stand_in, lambda: steps)
    following = asyncio.create_task(ours.follow())
    causes: list[Callable[[], None]] = [lambda: None, ours.correct_soon, steps.step, steps.step]
    for cause in causes:
        cause()
        assert abs(await asyncio.wait_for(agent.told.get(), 10) - time.time()) < 5
    following.cancel()
    await asyncio.wait([following])
    assert steps.closed
    assert agent.told.empty()


async def test_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.PERIOD_S >= 120  # an idle shim sleeps
    monkeypatch.setattr(clock, "PERIOD_S", 0.01)
    agent, steps = Agent(), Steps()
    stand_in: Any = agent
    following = asyncio.create_task(GuestClock(stand_in, lambda: steps).follow())
    for _ in range(3):
        await asyncio.wait_for(agent.told.get(), 10)
    following.cancel()
    await asyncio.wait([following])


async def test_again_when_the_guest_was_told_late() -> None:
    agent, steps = Agent(), Steps()
    stand_in: Any = agent
    agent.answer = lambda: time.sleep(0.05)
    following = asyncio.create_task(GuestClock(stand_in, lambda: steps).follow())
    for _ in range(3):
        await asyncio.wait_for(agent.told.get(), 10)
    await asyncio.sleep(0)
    assert agent.told.empty()  # it does not get better
    following.cancel()
    await asyncio.wait([following])


async def test_a_guest_that_will_have_none_of_it_is_left_alone() -> None:
    agent, steps = Agent(), Steps()
    stand_in: Any = agent

    def refuse() -> None:
        raise RpcError(Code.PERMISSION_DENIED, "policy")

    agent.answer = refuse
    await asyncio.wait_for(GuestClock(stand_in, lambda: steps).follow(), 10)
    assert agent.told.qsize() == 1
    assert steps.closed


async def test_a_host_that_tells_no_steps_costs_only_those() -> None:
    def none() -> Steps:
        raise OSError(24, "timerfd_create: Too many open files")

    agent = Agent()
    stand_in: Any = agent
    following = asyncio.create_task(GuestClock(stand_in, none).follow())
    await asyncio.wait_for(agent.told.get(), 10)
    following.cancel()
    await asyncio.wait([following])


def test_the_kernel_tells_of_steps_of_the_time_of_day() -> None:
    """Setting the clock of this machine is not for a test: what the kernel was asked for is read back."""
    steps = HostClockSteps()
    try:
        told = Path(f"/proc/self/fdinfo/{steps.fd}").read_text()
        words = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
        assert int(words["clockid"]) == time.CLOCK_REALTIME
        assert int(words["settime flags"], 8) == 0o3  # absolute, cancelled by a step
        assert not steps.happened()
        assert not os.get_blocking(steps.fd)
        assert not os.get_inheritable(steps.fd)
    finally:
        steps.close()

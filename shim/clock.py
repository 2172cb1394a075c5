"""The guest's time of day is the host's: set when the guest is up, when containers go on after a pause, when somebody
sets the host's clock, and now and then, since no two clocks run alike.

A guest starts with what its real-time clock says, in whole seconds, and counts on from there by itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import structlog

from agent_proto.gen import agent_pb2
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent_proto.client import AgentClient

log = structlog.get_logger()

# Emulated clocks were seen to run 100 millionths apart from the host's at most: 30 ms in that time. A shim that
# nobody talks to wakes up for nothing else.
PERIOD_S = 300.0
# How late the guest may be told what time it is; it is asked again to look at its clock when it took longer.
_LATE_S = 0.03
_TRIES = 3
# <linux/timerfd.h>
_TFD_NONBLOCK, _TFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_TFD_TIMER_ABSTIME, _TFD_TIMER_CANCEL_ON_SET = 1, 2
_NEVER_S = 2**63 - 1


class ClockSteps(Protocol):
    """A descriptor that is readable when the clock may have been set, and whether it has been."""

    fd: int

    def happened(self) -> bool: ...

    def close(self) -> None: ...


class HostClockSteps:
    """The kernel's word that somebody has set the time of day, or that the host has slept: a timer that never expires
    and is cancelled by it (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET)."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.timerfd_create(time.CLOCK_REALTIME, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            raise _failed("timerfd_create")
        never = (ctypes.c_long * 4)(0, 0, _NEVER_S, 0)
        flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
        if libc.timerfd_settime(self.fd, flags, ctypes.byref(never), None) < 0:
            err = _failed("timerfd_settime")
            self.close()
            raise err

    def happened(self) -> bool:
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return False
        except OSError as err:
            if err.errno != errno.ECANCELED:
                raise
        return True

    def close(self) -> None:
        os.close(self.fd)


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


class GuestClock:
    """Of one guest. `watch` makes what tells of the host's clock being set."""

    def __init__(self, agent: AgentClient, watch: Callable[[], ClockSteps] = HostClockSteps) -> None:
        self._agent = agent
        self._watch = watch
        self._due = asyncio.Event()

    def correct_soon(self) -> None:
        """The guest may have missed something: set its clock."""
        self._due.set()

    async def follow(self) -> None:
        """Keep the guest's clock right, until cancelled or until the guest is gone or will have none of it."""
        with self._watching():
            while await self._correct():
                with suppress(TimeoutError):
                    async with asyncio.timeout(PERIOD_S):
                        await self._due.wait()
                self._due.clear()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            steps = self._watch()
        except OSError as err:
            log.warning("host_clock_not_watched", error=str(err))
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(steps.fd, self._look, steps)
        try:
            yield
        finally:
            loop.remove_reader(steps.fd)
            steps.close()

    def _look(self, steps: ClockSteps) -> None:
        if steps.happened():
            log.info("host_clock_set")
            self.correct_soon()

    async def _correct(self) -> bool:
        """Tell the guest the time, again if that took long. Returns whether there is a point in doing it later."""
        for _ in range(_TRIES):
            began, now_us = time.monotonic(), time.time_ns() // 1000
            request = agent_pb2.SetGuestDateTimeRequest(Sec=now_us // 1_000_000, Usec=now_us % 1_000_000)
            try:
                await self._agent.set_guest_date_time(request)
            except RpcError as err:
                if err.code is Code.DEADLINE_EXCEEDED:
                    continue  # a guest that hangs is somebody else's matter
                log.info("guest_clock_left_alone", reason=str(err))
                return False
            if time.monotonic() - began <= _LATE_S:
                break
        return True

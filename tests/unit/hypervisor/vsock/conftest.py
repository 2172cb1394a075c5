from __future__ import annotations

import asyncio
import gc
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.vsock.user import UserVsock
from tests.unit.hypervisor.vsock.driver import MEMFD_NAME, Guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(MEMFD_NAME in line for line in maps)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every descriptor and every mapping of guest memory is gone after the test."""
    before = len(open_fds())
    yield
    assert mappings() == 0
    assert len(open_fds()) <= before


@pytest.fixture(autouse=True)
async def quiet_loop(nothing_left: None) -> AsyncIterator[list[dict[str, Any]]]:
    """Nothing may ever be raised into the event loop; a test that expects a report takes it out of the list."""
    reports: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    yield reports
    gc.collect()  # an exception that nobody looked at is reported when its future goes
    await asyncio.sleep(0)
    assert reports == []


@pytest.fixture
async def pair() -> AsyncIterator[Callable[..., tuple[UserVsock, Guest]]]:
    """Makes devices, each with a guest that is not booted yet."""
    made: list[tuple[UserVsock, Guest]] = []

    def make(**options: Any) -> tuple[UserVsock, Guest]:
        ours, theirs = socket.socketpair()
        made.append((UserVsock(ours), Guest(theirs, **options)))
        return made[-1]

    yield make
    for device, guest in made:
        await device.aclose()
        assert mappings() <= len(made), "the device has let go of guest memory"
        guest.close()


@pytest.fixture
async def booted(
    pair: Callable[..., tuple[UserVsock, Guest]],
) -> tuple[UserVsock, Guest]:
    device, guest = pair()
    await guest.boot()
    return device, guest

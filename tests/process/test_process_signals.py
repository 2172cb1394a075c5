"""Signals to the shim: an end that was asked for is a clean one, and what does not ask for it does nothing.

That the ends of containers are told is shown in every state by the fault matrix.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import host
from tests.support.bundles import shell, spec
from tests.support.fake_containerd import task_events
from ttrpc import RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_containerd import FakeContainerd, Shim


@pytest.fixture
def bundle(containerd: FakeContainerd, name: str) -> Path:
    return containerd.bundle(name, spec(shell("exec sleep 100")))


@pytest.fixture
async def shim(containerd: FakeContainerd, name: str, bundle: Path) -> Shim:
    """A shim with a running container."""
    shim = await containerd.start(name, bundle)
    await shim.create()
    await shim.call("Start")
    return shim


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE], ids=lambda number: number.name)
async def test_signals_that_mean_nothing(shim: Shim, number: signal.Signals) -> None:
    os.kill(shim.pid, number)
    assert (await shim.call("State")).status == 2


async def test_sigquit_is_a_clean_end(containerd: FakeContainerd, shim: Shim) -> None:
    os.kill(shim.pid, signal.SIGQUIT)
    await host.ended(shim.pid)
    assert task_events(containerd.events.items)[-1] == ("/tasks/exit", shim.id)


async def test_several_signals_are_one_end(containerd: FakeContainerd, shim: Shim) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(shim.pid, number)
    await host.ended(shim.pid)
    assert task_events(containerd.events.items).count(("/tasks/exit", shim.id)) == 1


async def test_sigterm_while_the_guest_boots(
    containerd: FakeContainerd, name: str, bundle: Path, config: Path
) -> None:
    config.write_text(config.read_text().replace("unix:", "unix:/nobody/listens/here"))
    shim = await containerd.start(name, bundle)
    creating = asyncio.create_task(shim.create())
    await asyncio.create_task(shim.call("Connect"))  # the shim has got the request before this one
    os.kill(shim.pid, signal.SIGTERM)
    with pytest.raises(RpcError) as caught:
        await creating
    assert "\n" not in caught.value.message
    await host.ended(shim.pid)
    assert containerd.events.items == []


async def test_sigterm_before_anything(containerd: FakeContainerd, name: str, bundle: Path) -> None:
    """The daemon still loads its code: it ends at once, and `delete` finds what there is."""
    answer = await containerd.run("start", name, bundle)
    assert answer.code == 0
    (daemon, *_) = (pid for pid, words in host.descendants(os.getpid()).items() if f"-id {name}" in words)
    os.kill(daemon, signal.SIGTERM)
    async with asyncio.timeout(10):
        await host.ended(daemon)
        for pid, words in host.descendants(os.getpid()).items():
            if name in words:  # QEMU, which the kernel ends with it
                await host.ended(pid)
    assert (await containerd.delete(name, bundle)).exit_status == 137

"""How much the shim says: a story that a person can read, and nothing while nothing happens."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from tests.support.bundles import FifoEnd, shell, spec

if TYPE_CHECKING:
    from tests.support.fake_containerd import FakeContainerd


async def test_a_life_is_a_short_story(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("exec sleep 100")))
    with FifoEnd.reader(str(bundle / "log")) as log:
        shim = await containerd.start(name, bundle)
        await shim.create()
        await shim.call("Start")
        before = _lines(log.fd)
        for number in range(5):  # probes, monitoring and somebody's terminal
            for verb in ("State", "Pids", "Stats", "Connect", "ResizePty"):
                await shim.call(verb)
            await shim.exec(f"e{number}", shell("exit 1"))
            await shim.call("Start", exec_id=f"e{number}")
            await shim.call("Wait", exec_id=f"e{number}")
            await shim.call("Delete", exec_id=f"e{number}")
        await asyncio.sleep(0.2)  # an idle moment; what it would be filled with is not known
        assert _lines(log.fd) == []
        await shim.call("Kill", signal=9)
        await shim.call("Wait")
        await shim.call("Delete")
        await shim.shutdown()
        story = before + _lines(log.fd)
    assert len(story) <= 15, story
    words = (
        "Create",
        "Start",
        "Kill",
        "Delete",
        "Shutdown",
        "process_exited",
        "sandbox_up",
        "sandbox_stopped",
    )
    assert all(any(word in line for line in story) for word in words), story


def _lines(fd: int) -> list[str]:
    data = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except BlockingIOError:
            break
        if not piece:
            break
        data += piece
    return data.decode().splitlines()

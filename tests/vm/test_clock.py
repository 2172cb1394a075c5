"""A real guest's time of day: after the boot, and after its machine has stood still."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

from shim.clock import GuestClock
from tests.vm.guest import LOG_VPORT, MARKS, PATIENCE_S, running_guest

if TYPE_CHECKING:
    from pathlib import Path

    from agent_proto.gen.oci_pb2 import Spec
    from tests.vm.guest import Guest

pytestmark = MARKS
# What the guest's clock may be off.
OFF_S = 0.05
STANDSTILL_S = 1.0


async def error_s(guest: Guest, lines: asyncio.StreamReader) -> float:
    """How far the guest's clock is off at the least: its agent writes into its log what time it is, at some moment
    between two moments of ours."""
    before = time.time()
    container = asyncio.create_task(guest.result("true", change=_labelled))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            line = json.loads(await lines.readline())
            if line["msg"] == "not_of_this_guest":
                break
        after = time.time()
    await container
    told = datetime.fromisoformat(line["ts"]).timestamp()
    return max(before - told, told - after, 0.0)


def _labelled(spec: Spec) -> None:
    """With something that the guest has not, which the agent writes down."""
    spec.Process.SelinuxLabel = "a:b:c:d"


async def test_it_is_the_hosts(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        corrected = asyncio.Event()
        tell = guest.agent.set_guest_date_time

        async def told(request):  # type: ignore[no-untyped-def]
            answer = await tell(request)
            corrected.set()
            return answer

        guest.agent.set_guest_date_time = told  # type: ignore[method-assign]
        lines, log = await asyncio.open_connection(sock=await guest.machine.vsock.connect(LOG_VPORT))
        clock = GuestClock(guest.agent)
        following = asyncio.create_task(clock.follow())
        try:
            await asyncio.wait_for(corrected.wait(), PATIENCE_S)
            assert await error_s(guest, lines) <= OFF_S
            await guest.machine.pause()
            await asyncio.sleep(STANDSTILL_S)
            await guest.machine.resume()
            assert await error_s(guest, lines) > STANDSTILL_S / 2  # else there was nothing to correct
            corrected.clear()
            clock.correct_soon()
            await asyncio.wait_for(corrected.wait(), PATIENCE_S)
            assert await error_s(guest, lines) <= OFF_S
        finally:
            following.cancel()
            await asyncio.wait([following])
            log.close()

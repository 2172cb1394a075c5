"""Reports for the host of containers that ran out of memory, and their place before the exits they caused."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

#: Reports nobody fetched; more than that of one host say nothing new.
MAX_REPORTS = 128
#: How long an exit waits for its report to be fetched. A host that asks does so again at once.
FETCH_S = 1.0


class OomReports:
    """Container ids in the order in which they ran out of memory."""

    def __init__(self) -> None:
        self._queue: deque[str] = deque(maxlen=MAX_REPORTS)
        self._added = asyncio.Event()
        self._taken = asyncio.Event()
        self._host_asks = False

    def add(self, container_id: str) -> None:
        self._queue.append(container_id)
        self._added.set()

    async def next(self) -> str:
        """The next report, once there is one."""
        self._host_asks = True
        while not self._queue:
            self._added.clear()
            await self._added.wait()
        self._taken.set()
        return self._queue.popleft()

    async def fetched(self, container_id: str) -> None:
        """Return when the host has been told all there is of a container, or does not seem to want to know."""
        if self._host_asks:
            with suppress(TimeoutError):
                async with asyncio.timeout(FETCH_S):
                    while container_id in self._queue:
                        self._taken.clear()
                        await self._taken.wait()

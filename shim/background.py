"""What a sandbox does beside the calls that it answers, and no longer than it lives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeAlias

    InBackground: TypeAlias = Callable[[Coroutine[Any, Any, None], str], None]
    """Begins some work, which is given a name, and does not wait for it."""


class Background:
    """Work that nobody waits for; it tells of its failures itself."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Let it run until it has done, or until `cancel`."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        """End all of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

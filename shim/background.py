"""What a sandbox does beside the calls that it answers, and no longer than it lives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeAlias

    InBackground: TypeAlias = Callable[[Coroutine[Any, Any, None], str], None]
    """Begins some work, which is given a name, and does not wait for it."""


async def apart(work: Callable[[], None]) -> None:
    """Do work that blocks, in a thread that is there no longer than it takes. Cancelled or not, it has been done when
    this returns. Raises what it raises."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, work)


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


class Unbroken:
    """Work of several steps that goes on to its end when whoever waits for it goes away: what is half done could
    neither be used nor undone."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        """Whether some of it goes on."""
        return bool(self._tasks)

    async def run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do it, and wait for it. Raises what it raises."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it may be that nobody waits any more

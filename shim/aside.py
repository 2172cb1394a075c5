"""Work that may wait for a file system, in a thread of its own.

A path may be on a server that does not answer (NFS), and a disk may be slow. Who waits for that is the one container,
not the event loop with everybody else's calls. The threads are not those of the event loop's pool: it has few, and a
hung file system would take all of them. They hold nobody up who ends.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def aside(work: Callable[[], T], *, unwanted: Callable[[T], None] | None = None) -> T:
    """Do it, and wait for that. Raises what it raises.

    Who is cancelled waits no longer, but the work goes on: `unwanted` gets what comes out of it, on the event loop.
    So it does when the work had been done and only its caller did not know yet.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T) -> None:
        if not done.done():
            done.set_result(result)
        elif unwanted is not None:
            unwanted(result)

    def fail(err: BaseException) -> None:
        if not done.done():
            done.set_exception(err)

    def run() -> None:
        try:
            told = partial(settle, work())
        except BaseException as err:
            told = partial(fail, err)
        with suppress(RuntimeError):  # the event loop is closed: everything ends
            loop.call_soon_threadsafe(told)

    threading.Thread(target=run, name="aside", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        if unwanted is not None and not done.cancelled() and done.exception() is None:
            unwanted(done.result())
        raise


async def aside_with_undo(work: Callable[[ExitStack], T], undo: ExitStack) -> T:
    """The same for work that tells how to take it back, which `undo` learns once it is done. What was done for somebody
    who has been cancelled is taken back at once, and so is what came before a failure."""

    def step() -> tuple[T, ExitStack]:
        with ExitStack() as own:
            return work(own), own.pop_all()
        raise AssertionError("no exit of the stack swallows errors")

    result, kept = await aside(step, unwanted=lambda outcome: outcome[1].close())
    undo.push(kept)
    return result

"""Work beside the event loop: in a thread, or in a process of its own."""

from __future__ import annotations

import os
from _thread import start_new_thread
from asyncio import get_running_loop
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import TypeVar

    from guest_agent.reaper import Reaper

    T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Do it in a thread, and wait for that. It cannot be cancelled. Raises what it raises."""
    loop = get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as err:
            loop.call_soon_threadsafe(_settle, done, partial(done.set_exception, err))
        else:
            loop.call_soon_threadsafe(_settle, done, partial(done.set_result, result))

    start_new_thread(run, ())
    return await done


def _settle(done: asyncio.Future[T], settle: Callable[[], None]) -> None:
    """Unless nobody waits for it any more."""
    if not done.done():
        settle()


async def aside(reaper: Reaper, work: Callable[[], None]) -> None:
    """Do something that may wait long for the kernel in a child of ours: nothing but system calls, since the child has
    our memory as it was. Raises OSError as the work did, without its words.
    """
    with reaper.births():
        pid = os.fork()
        if pid == 0:
            code = 255
            try:
                work()
                code = 0
            except OSError as err:
                code = err.errno or 255
            finally:
                os._exit(code)
        ended = reaper.watch(pid)
    code = await ended
    if code != 0:
        raise OSError(code, os.strerror(code))

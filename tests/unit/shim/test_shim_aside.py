"""Work in threads of its own: what comes out of it, and what becomes of it when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack

import pytest

from shim.aside import aside, aside_with_undo


async def test_results_and_errors() -> None:
    assert await aside(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 // 0)
    assert await aside(threading.current_thread) is not threading.current_thread()


async def test_the_event_loop_goes_on_and_as_many_may_hang_as_want() -> None:
    """More than the event loop's own pool has threads."""
    go = threading.Event()
    hanging = [asyncio.create_task(aside(go.wait)) for _ in range(100)]
    while threading.active_count() < 100:
        await asyncio.sleep(0)
    assert await asyncio.to_thread(lambda: 1) == 1
    go.set()
    assert await asyncio.gather(*hanging) == [True] * 100


async def test_what_nobody_waits_for_is_taken_back() -> None:
    go, taken_back = threading.Event(), asyncio.Event()
    undo = ExitStack()

    def work(own: ExitStack) -> None:
        own.callback(taken_back.set)
        go.wait()

    task = asyncio.create_task(aside_with_undo(work, undo))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not taken_back.is_set()
    undo.close()
    go.set()
    async with asyncio.timeout(20):
        await taken_back.wait()


async def test_what_was_done_in_the_moment_of_cancelling_is_taken_back() -> None:
    """The result is there, and whoever waits for it has not been woken yet."""
    taken_back: list[str] = []
    undo = ExitStack()

    def work(own: ExitStack) -> None:
        own.callback(taken_back.append, "undone")

    task = asyncio.create_task(aside_with_undo(work, undo))
    await asyncio.sleep(0)
    for thread in threading.enumerate():
        if thread.name == "aside":
            thread.join()
    asyncio.get_running_loop().call_soon(task.cancel)  # behind what the thread has left there
    with pytest.raises(asyncio.CancelledError):
        await task
    undo.close()
    assert taken_back == ["undone"]


async def test_what_was_done_is_undone_later_or_with_a_failure() -> None:
    done: list[str] = []

    def good(own: ExitStack) -> int:
        own.callback(done.append, "undone")
        return 1

    def bad(own: ExitStack) -> None:
        own.callback(done.append, "undone at once")
        raise OSError(5, "bad")

    with ExitStack() as undo:
        assert await aside_with_undo(good, undo) == 1
        assert done == []
        with pytest.raises(OSError, match="bad"):
            await aside_with_undo(bad, undo)
        assert done == ["undone at once"]
    assert done == ["undone at once", "undone"]

"""Whatever the pieces and whoever comes and goes: what arrives is what was sent."""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from shim.io import ProcessIO, Stdio
from tests.support.bundles import FifoEnd
from tests.unit.shim.test_shim_io import FakeStreams

if TYPE_CHECKING:
    from collections.abc import Iterator

# Large pieces are rare among those that hypothesis likes, and fill a FIFO: they are numbers here, not bytes.
PIECES = st.lists(st.integers(1, 256 * 1024), max_size=12)
# Each reader takes so many bytes, in reads of so many at most, and goes; the last one stays to the end. A thousand
# reads are enough for anybody.
READERS = st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 70_000)), max_size=4)


def pieces_of(sizes: list[int]) -> list[bytes]:
    """Bytes that differ from place to place, in pieces of these sizes."""
    data = bytes(range(251)) * (sum(sizes) // 251 + 1)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@contextmanager
def fifo() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/fifo"
        os.mkfifo(path)
        yield path


@settings(max_examples=60, deadline=None)
@given(sizes=PIECES, readers=READERS, early=st.booleans(), closing=st.booleans())
async def test_readers_that_come_and_go(
    sizes: list[int], readers: list[tuple[int, int]], early: bool, closing: bool
) -> None:
    """Early ones are there before the process is, late ones after it has written or while it is deleted."""
    pieces = pieces_of(sizes)
    whole = b"".join(pieces)
    received = b""
    with fifo() as path:
        process = ProcessIO(Stdio(stdout=path), "x")
        first = FifoEnd.reader(path) if early else None
        process.start(FakeStreams(pieces))
        deleting = asyncio.create_task(process.aclose()) if closing and early else None
        for number, (count, size) in enumerate(readers):
            # While the process is deleted its last reader may not go: nobody would keep the bytes.
            with FifoEnd.reader(path) if number or first is None else _kept(first) as end:
                goal = min(len(received) + count, len(whole))
                size = max(size, count // 1000)
                while len(received) < goal:
                    received += await end.read(min(size, goal - len(received)))
                if deleting is None:
                    await asyncio.sleep(0)
        if deleting is None and first is not None:
            first.close()
            first = None
        with first or FifoEnd.reader(path) as end:
            received += await end.read_to_end()
        await (deleting or process.aclose())
    assert received == whole


@contextmanager
def _kept(end: FifoEnd) -> Iterator[FifoEnd]:
    yield end


@settings(max_examples=60, deadline=None)
@given(writers=st.lists(st.lists(st.integers(1, 150_000), max_size=4), max_size=4), told_at=st.integers(0, 4))
async def test_writers_that_come_and_go(writers: list[list[int]], told_at: int) -> None:
    """`CloseIO` may come before the last writer has gone, and then the stream ends with that one."""
    sent = b""
    with fifo() as path:
        guest = FakeStreams()
        process = ProcessIO(Stdio(stdin=path), "x")
        process.open_stdin()
        process.start(guest)
        for number, sizes in enumerate(writers[: told_at + 1]):
            with FifoEnd.writer(path) as end:
                if number == told_at:
                    process.close_stdin()
                for piece in pieces_of(sizes):
                    sent += piece
                    await end.write(piece)
        process.close_stdin()
        await guest.stdin_closed.wait()
        assert guest.received == sent
        await process.aclose()

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios

import pytest

from guest_agent import stdio
from guest_agent.errors import StateConflict
from guest_agent.stdio import Output, Stdio

PIPE_BYTES = 4096


@pytest.fixture
async def pair() -> tuple[Stdio, list[int]]:
    """Our side, and the process's descriptors, for a test to read, write and close."""
    ours, theirs = Stdio.pipes(PIPE_BYTES)
    return ours, list(theirs.fds)


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def read_all(fd: int, size: int) -> bytes:
    """What a process would read, in pieces that are smaller than the pipe."""
    process = Output(os.dup(fd))
    data = b""
    while len(data) < size:
        data += await process.read(1000)
    process.close()
    return data


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_output_waits_for_data(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stdout is not None
    reading = asyncio.create_task(ours.stdout.read(100))
    await settle()
    assert not reading.done()
    os.write(stdout, b"hello")
    assert await reading == b"hello"
    close([stdin, stdout, stderr])
    ours.close()


async def test_output_in_pieces_then_the_end(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stderr is not None
    os.write(stderr, b"abcdef")
    assert await ours.stderr.read(4) == b"abcd"
    close([stdin, stdout, stderr])
    assert await ours.stderr.read(4) == b"ef"
    assert await ours.stderr.read(4) == b""
    assert ours.stderr.closed
    assert await ours.stderr.read(4) == b""
    ours.close()


async def test_readers_take_turns(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stdout is not None
    readers = [asyncio.create_task(ours.stdout.read(3)) for _ in range(3)]
    await settle()
    os.write(stdout, b"aaabbb")
    close([stdin, stdout, stderr])
    assert await asyncio.gather(*readers) == [b"aaa", b"bbb", b""]
    ours.close()


async def test_a_cancelled_reader_takes_nothing_with_it(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stdout is not None
    first = asyncio.create_task(ours.stdout.read(100))
    await settle()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    os.write(stdout, b"kept")
    assert await ours.stdout.read(100) == b"kept"
    close([stdin, stdout, stderr])
    ours.close()


async def test_one_read_is_bounded(monkeypatch: pytest.MonkeyPatch, pair: tuple[Stdio, list[int]]) -> None:
    monkeypatch.setattr(stdio, "MAX_READ", 10)
    ours, fds = pair
    assert ours.stdout is not None
    os.write(fds[1], b"x" * 100)
    assert await ours.stdout.read(2**32 - 1) == b"x" * 10
    assert await ours.stdout.read(0) == b"x" * 10
    close(fds)
    ours.close()


async def test_closing_wakes_a_reader(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    assert ours.stdout is not None
    reading = asyncio.create_task(ours.stdout.read(100))
    await settle()
    ours.close()
    assert await reading == b""
    close(fds)


async def test_input_waits_for_room_and_is_complete(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    assert ours.stdin is not None
    data = os.urandom(5 * PIPE_BYTES)
    writing = asyncio.create_task(ours.stdin.write(data))
    await settle()
    assert not writing.done()
    assert await read_all(fds[0], len(data)) == data
    assert await writing == len(data)
    ours.close_stdin()
    assert os.read(fds[0], 10) == b""
    close(fds)
    ours.close()


async def test_writers_do_not_mix(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    assert ours.stdin is not None
    size = 3 * PIPE_BYTES
    writers = [asyncio.create_task(ours.stdin.write(letter * size)) for letter in (b"a", b"b")]
    assert await read_all(fds[0], 2 * size) == b"a" * size + b"b" * size
    assert await asyncio.gather(*writers) == [size, size]
    close(fds)
    ours.close()


async def test_a_process_that_closed_its_stdin(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stdin is not None
    os.close(stdin)
    with pytest.raises(StateConflict, match="the process has closed its stdin"):
        await ours.stdin.write(b"x")
    with pytest.raises(StateConflict, match="stdin is closed"):
        await ours.stdin.write(b"x")
    close([stdout, stderr])
    ours.close()


async def test_a_process_that_closes_its_stdin_while_we_wait(pair: tuple[Stdio, list[int]]) -> None:
    ours, (stdin, stdout, stderr) = pair
    assert ours.stdin is not None
    writing = asyncio.create_task(ours.stdin.write(bytes(10 * PIPE_BYTES)))
    await settle()
    os.close(stdin)
    with pytest.raises(StateConflict):
        await writing
    close([stdout, stderr])
    ours.close()


async def test_the_pipes_have_the_size_asked_for(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    assert [fcntl.fcntl(fd, 1032) for fd in fds] == [PIPE_BYTES] * 3  # F_GETPIPE_SZ
    close(fds)
    ours.close()


async def test_descriptors_are_not_inherited(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    assert not any(os.get_inheritable(fd) for fd in fds)
    close(fds)
    ours.close()


# Terminals


async def test_terminal() -> None:
    controlling, used = os.openpty()
    ours = Stdio.terminal(controlling)
    assert ours.stdin is not None
    assert ours.stdout is not None
    assert ours.stderr is None
    ours.resize(33, 101)
    assert struct.unpack("HHHH", fcntl.ioctl(used, termios.TIOCGWINSZ, bytes(8)))[:2] == (33, 101)
    await ours.stdin.write(b"ab\n")
    assert os.read(used, 10) == b"ab\n"
    os.write(used, b"out")
    text = b""
    while not text.endswith(b"out"):
        text += await ours.stdout.read(100)
    assert text == b"ab\r\nout"
    ours.close_stdin()  # the end of input is a character on a terminal
    await ours.stdin.write(b"more\n")
    os.close(used)
    rest = b""
    while piece := await ours.stdout.read(100):
        rest += piece
    assert rest in (b"", b"more\r\n")
    ours.close()


async def test_pipes_cannot_be_resized(pair: tuple[Stdio, list[int]]) -> None:
    ours, fds = pair
    with pytest.raises(StateConflict, match="no terminal"):
        ours.resize(1, 1)
    close(fds)
    ours.close()


async def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ours, theirs = Stdio.pipes()
        with theirs:
            pass
        ours.close()
        ours.close()
        controlling, used = os.openpty()
        os.close(used)
        Stdio.terminal(controlling).close()
    assert set(os.listdir("/proc/self/fd")) == before

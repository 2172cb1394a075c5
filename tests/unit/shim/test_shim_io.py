"""Streams between FIFOs and a guest that is played by the test."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim import host_streams, io
from shim.errors import InvalidRequest
from shim.io import ProcessIO, Stdio
from tests.support.bundles import FifoEnd, Fifos, make_fifos, read_all
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class FakeStreams:
    """The guest's side: chunks to give for stdout and stderr, and what came on stdin."""

    def __init__(
        self, stdout: Sequence[bytes] = (), stderr: Sequence[bytes] = (), *, open_ended: bool = False
    ) -> None:
        self.received = b""
        self.stdin_closed = asyncio.Event()
        self.reads = 0
        self.error: RpcError | None = None
        self.write_error: RpcError | None = None
        self._chunks = {"stdout": list(stdout), "stderr": list(stderr)}
        self._open_ended = open_ended

    async def read_stdout(self, size: int) -> bytes:
        return await self._read("stdout", size)

    async def read_stderr(self, size: int) -> bytes:
        return await self._read("stderr", size)

    async def write_stdin(self, data: bytes) -> None:
        await asyncio.sleep(0)
        if self.write_error is not None:
            raise self.write_error
        self.received += data

    async def close_stdin(self) -> None:
        self.stdin_closed.set()

    async def _read(self, name: str, size: int) -> bytes:
        self.reads += 1
        chunks = self._chunks[name]
        if chunks:
            assert len(chunks[0]) <= size
            await asyncio.sleep(0)
            return chunks.pop(0)
        if self.error is not None:
            raise self.error
        if self._open_ended:
            await asyncio.Event().wait()
        return b""


class EndlessStreams(FakeStreams):
    """A process that never stops writing."""

    async def _read(self, name: str, size: int) -> bytes:
        await asyncio.sleep(0)
        return b"x"


def open_fds() -> set[str]:
    """This process's descriptors, without those of listing them."""
    return {f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd") if _exists(fd)}


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.fixture
def fifos(tmp_path: Path) -> Fifos:
    return make_fifos(tmp_path / "io")


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert {entry for entry in open_fds() - before if "/io/" in entry} == set()


async def test_streams_do_not_mix(fifos: Fifos) -> None:
    process = ProcessIO(Stdio(*fifos), "x")
    process.open_stdin()
    process.start(FakeStreams([b"o1", b"o2"], [b"e"]))
    assert (await read_all(fifos.stdout), await read_all(fifos.stderr)) == (b"o1o2", b"e")
    await process.aclose()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=70_000), max_size=8),
    read_size=st.sampled_from([1000, 4096, 65536]),
)
async def test_torn_output(tmp_path: Path, chunks: list[bytes], read_size: int) -> None:
    stdout = str(tmp_path / f"out{len(os.listdir(tmp_path))}")
    os.mkfifo(stdout)
    process = ProcessIO(Stdio(stdout=stdout), "x")
    process.start(FakeStreams(chunks))
    with FifoEnd.reader(stdout) as end:
        assert await end.read_to_end(read_size) == b"".join(chunks)
    await process.aclose()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(chunks=st.lists(st.binary(min_size=1, max_size=100_000), max_size=6))
async def test_torn_input(tmp_path: Path, chunks: list[bytes]) -> None:
    stdin = str(tmp_path / f"in{len(os.listdir(tmp_path))}")
    os.mkfifo(stdin)
    guest = FakeStreams()
    process = ProcessIO(Stdio(stdin=stdin), "x")
    process.open_stdin()
    process.start(guest)
    with FifoEnd.writer(stdin) as end:
        for chunk in chunks:
            await end.write(chunk)
    process.close_stdin()
    await guest.stdin_closed.wait()
    assert guest.received == b"".join(chunks)
    await process.aclose()


async def test_stdin_stays_open_until_told(fifos: Fifos) -> None:
    guest = FakeStreams()
    process = ProcessIO(Stdio(stdin=fifos.stdin), "x")
    process.open_stdin()
    process.start(guest)
    for word in (b"one", b"two"):
        with FifoEnd.writer(fifos.stdin) as end:
            await end.write(word)
    with FifoEnd.writer(fifos.stdin) as end:
        process.close_stdin()
        await end.write(b"three")
        assert not guest.stdin_closed.is_set()
    await guest.stdin_closed.wait()
    assert guest.received == b"onetwothree"
    process.close_stdin()
    await process.aclose()


async def test_close_before_the_start(fifos: Fifos) -> None:
    """`CloseIO` before `Start` means that nothing was and will be written: no writer gets past its open before."""
    guest = FakeStreams()
    process = ProcessIO(Stdio(stdin=fifos.stdin), "x")
    process.close_stdin()
    process.open_stdin()
    process.start(guest)
    await guest.stdin_closed.wait()
    assert guest.received == b""
    await process.aclose()


async def test_no_writer_gets_past_its_open_before_the_start(fifos: Fifos) -> None:
    """A client that had written and gone before could not say `CloseIO` for a process it has not been given yet."""
    process = ProcessIO(Stdio(stdin=fifos.stdin), "x")
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(fifos.stdin, os.O_WRONLY | os.O_NONBLOCK)
    await process.aclose()


async def test_process_that_closed_its_stdin(fifos: Fifos) -> None:
    guest = FakeStreams()
    guest.write_error = RpcError(Code.INTERNAL, "broken pipe")
    process = ProcessIO(Stdio(stdin=fifos.stdin), "x")
    process.open_stdin()
    process.start(guest)
    with FifoEnd.writer(fifos.stdin) as end:
        await end.write(b"nobody reads")
    process.stop_stdin()
    await process.aclose()
    assert not guest.stdin_closed.is_set()


async def test_error_instead_of_the_end(fifos: Fifos) -> None:
    """Agents of Kata before 4.1 answer the end of a stream with an error."""
    guest = FakeStreams([b"last"])
    guest.error = RpcError(Code.INTERNAL, "read meet eof")
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    process.start(guest)
    assert await read_all(fifos.stdout) == b"last"
    await process.aclose()


async def test_late_reader(fifos: Fifos) -> None:
    guest = FakeStreams([b"quick"])
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    process.start(guest)
    closing = asyncio.create_task(process.aclose())
    with FifoEnd.reader(fifos.stdout) as end:
        assert await end.read_to_end() == b"quick"
    await closing


async def test_closing_waits_for_output_that_moves(fifos: Fifos) -> None:
    data = bytes(300_000)
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    process.start(FakeStreams([data[:150_000], data[150_000:]]))
    closing = asyncio.create_task(process.aclose())
    with FifoEnd.reader(fifos.stdout) as end:
        assert len(await end.read_to_end(10_000)) == len(data)
    await closing


async def test_closing_gives_up_what_does_not_move(fifos: Fifos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_IDLE_LIMIT_S", 0.05)
    process = ProcessIO(Stdio(*fifos), "x")
    process.open_stdin()
    process.start(FakeStreams([bytes(200_000)], open_ended=True))  # nobody reads, and there is no end
    await process.aclose()


async def test_exit_waits_until_the_reader_has_taken_everything(fifos: Fifos) -> None:
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    with FifoEnd.reader(fifos.stdout) as reader:
        process.start(FakeStreams([b"some", b"more"]))
        settling = asyncio.create_task(process.settle())
        assert await reader.read_exactly(7) == b"somemor"
        assert not settling.done()
        assert await reader.read(10) == b"e"
        await settling
    await process.aclose()


@pytest.mark.parametrize("open_ended", [False, True], ids=["unread", "held"])
async def test_exit_does_not_wait_for_a_reader_or_a_writer_that_does_nothing(
    fifos: Fifos, monkeypatch: pytest.MonkeyPatch, open_ended: bool
) -> None:
    monkeypatch.setattr(io, "_SETTLE_IDLE_S", 0.05)
    monkeypatch.setattr(host_streams, "_READER_IDLE_S", 0.05)
    before = open_fds()
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    process.start(FakeStreams([b"x"], open_ended=open_ended))
    await process.settle()
    with FifoEnd.reader(fifos.stdout) as reader:
        assert await reader.read_exactly(1) == b"x"
    process.abort()
    assert open_fds() == before


async def test_reader_blocks_only_its_own_stream(fifos: Fifos) -> None:
    process = ProcessIO(Stdio(*fifos), "x")
    process.open_stdin()
    process.start(FakeStreams([bytes(200_000)], [b"e"]))
    assert await read_all(fifos.stderr) == b"e"
    assert len(await read_all(fifos.stdout)) == 200_000
    await process.aclose()


async def test_abort(fifos: Fifos) -> None:
    guest = FakeStreams([bytes(200_000)], open_ended=True)
    process = ProcessIO(Stdio(*fifos), "x")
    process.open_stdin()
    process.start(guest)
    with FifoEnd.reader(fifos.stdout) as end:
        await end.read_exactly(1000)
        process.abort()
        process.abort()
        await end.read_to_end()


async def test_descriptors_are_reused_safely_after_an_abort(fifos: Fifos, tmp_path: Path) -> None:
    """The kernel gives the same numbers to the next FIFOs at once, before the loop has run again."""
    first = ProcessIO(Stdio(*fifos), "first")
    first.start(FakeStreams([bytes(200_000)], [bytes(200_000)], open_ended=True))
    with FifoEnd.reader(fifos.stdout) as end:
        await end.read_exactly(1)  # all its streams wait for somebody now
        first.abort()
    other = make_fifos(tmp_path / "other" / "io")
    guest = FakeStreams([bytes(200_000)])
    second = ProcessIO(Stdio(*other), "second")
    second.open_stdin()
    second.start(guest)
    reading = asyncio.create_task(read_all(other.stdout))
    with FifoEnd.writer(other.stdin) as end:
        await end.write(b"hello")
    second.close_stdin()
    await guest.stdin_closed.wait()
    assert (guest.received, len(await reading)) == (b"hello", 200_000)
    await second.aclose()


async def test_no_streams_no_calls() -> None:
    guest = FakeStreams([b"x"])
    process = ProcessIO(Stdio(), "x")
    process.start(guest)
    process.close_stdin()
    process.stop_stdin()
    await process.aclose()
    assert guest.reads == 0


async def test_terminal_has_no_stderr(fifos: Fifos) -> None:
    process = ProcessIO(Stdio("", fifos.stdout, fifos.stderr, terminal=True), "x")
    guest = FakeStreams([b"both"], [b"never asked for"])
    process.start(guest)
    assert await read_all(fifos.stdout) == b"both"
    await process.aclose()
    assert guest.reads == 2


async def test_file(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("old ")
    process = ProcessIO(Stdio(stdout=f"file://{file}"), "x")
    process.start(FakeStreams([b"new"]))
    await process.aclose()
    assert file.read_text() == "old new"


async def test_full_disk_does_not_stop_the_process() -> None:
    """A process that writes on must not be blocked for ever by an output that takes nothing more."""
    guest = FakeStreams([b"lost"] * 5)
    process = ProcessIO(Stdio(stdout="file:///dev/full"), "x")
    process.start(guest)
    await process.aclose()
    assert guest.reads == 6


@pytest.mark.parametrize("scheme", ["gopher", "file", "binary"])
async def test_schemes_of_stdin(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(InvalidRequest, match=f"stdin of x has the unknown scheme {scheme}://"):
        ProcessIO(Stdio(stdin=f"{scheme}:///y"), "x")


@pytest.mark.parametrize("bad", ["stdin", "stdout", "stderr"])
async def test_what_cannot_be_opened_leaves_nothing_open(fifos: Fifos, bad: str) -> None:
    paths = fifos._asdict() | {bad: "/no/such/folder/fifo"}
    with pytest.raises(InvalidRequest, match=f"cannot open {bad} of x /no/such/folder/fifo: No such file"):
        process = ProcessIO(Stdio(**paths), "x")
        try:
            process.open_stdin()
        finally:
            await process.aclose()


async def test_closing_gives_up_what_does_not_end(
    fifos: Fifos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that the process left behind writes on and on."""
    monkeypatch.setattr(io, "_IDLE_LIMIT_S", 0.05)
    monkeypatch.setattr(io, "_DRAIN_LIMIT_S", 0.1)
    process = ProcessIO(Stdio(stdout=f"file://{tmp_path}/log"), "x")
    process.start(EndlessStreams())
    async with asyncio.timeout(5):
        await process.aclose()
    assert (tmp_path / "log").stat().st_size > 0


async def test_closing_waits_for_a_slow_reader(fifos: Fifos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than one read of the guest's at a time, but it moves."""
    monkeypatch.setattr(io, "_IDLE_LIMIT_S", 0.4)
    data = bytes(200_000)
    process = ProcessIO(Stdio(stdout=fifos.stdout), "x")
    process.start(FakeStreams([data]))
    closing = asyncio.create_task(process.aclose())
    with FifoEnd.reader(fifos.stdout) as end:
        received = b""
        while chunk := await end.read(10_000):
            received += chunk
            await asyncio.sleep(0.06)  # the reader's pace
    assert len(received) == len(data)
    await closing


async def test_fifo_that_is_gone_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    with pytest.raises(InvalidRequest, match=r"cannot open stdout of x .*gone: No such file"):
        ProcessIO(Stdio(stdout=str(path)), "x")
    assert not path.exists()

"""What a stream may be named, and what becomes of names that make no sense."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
from typing import TYPE_CHECKING

import pytest

from shim import host_streams
from shim.errors import InvalidRequest
from shim.io import ProcessIO, Stdio
from tests.support.bundles import FifoEnd, make_fifos, read_all
from tests.unit.shim.test_shim_io import FakeStreams, open_fds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_descriptor_is_left(tmp_path: Path) -> Iterator[None]:
    before = open_fds()
    yield
    assert {entry for entry in open_fds() - before if str(tmp_path) in entry} == set()


async def run(guest: FakeStreams, *, stdin: str = "", stdout: str = "", stderr: str = "") -> None:
    """The whole life of a process with these streams."""
    process = ProcessIO(Stdio(stdin, stdout, stderr), "x")
    process.open_stdin()
    process.start(guest)
    if stdin:
        await guest.stdin_closed.wait()
    await process.aclose()


async def test_file_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    file = tmp_path / "a b" / "log"
    await run(FakeStreams([b"new"]), stdout=f"file://{tmp_path}/a%20b/log?ignored#too")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o644 & ~_umask())


async def test_both_streams_into_one_file(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/log"
    await run(FakeStreams([b"o"] * 3, [b"e"] * 3), stdout=uri, stderr=uri)
    assert sorted((tmp_path / "log").read_text()) == list("eeeooo")


async def test_both_streams_into_one_fifo(tmp_path: Path) -> None:
    fifo = make_fifos(tmp_path / "io", "stdout").stdout
    process = ProcessIO(Stdio(stdout=fifo, stderr=fifo), "x")
    process.start(FakeStreams([b"o" * 70_000, b"o"], [b"e"] * 3))
    output = await read_all(fifo)
    assert (output.count(b"o"), output.count(b"e"), len(output)) == (70_001, 3, 70_004)
    await process.aclose()


async def test_a_file_that_exists_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("old ")
    await run(FakeStreams([b"new"]), stdout=str(tmp_path / "log"), stderr="/dev/null")
    assert (tmp_path / "log").read_text() == "old new"


@pytest.mark.parametrize(
    "streams", [("stdout",), ("stderr",), ("stdin",), ("stdin", "stderr"), ("stdout", "stderr")]
)
@pytest.mark.parametrize("terminal", [False, True])
async def test_streams_that_are_absent(tmp_path: Path, streams: tuple[str, ...], terminal: bool) -> None:
    fifos = make_fifos(tmp_path / "io", *streams)
    guest = FakeStreams([b"o"], [b"e"])
    process = ProcessIO(Stdio(*fifos, terminal), "x")
    process.open_stdin()
    process.start(guest)
    if fifos.stdin:
        with FifoEnd.writer(fifos.stdin) as end:
            await end.write(b"i")
        process.close_stdin()
        await guest.stdin_closed.wait()
    closing = asyncio.create_task(process.aclose())
    if fifos.stdout:
        assert await read_all(fifos.stdout) == b"o"
    if fifos.stderr and not terminal:
        assert await read_all(fifos.stderr) == b"e"
    await closing
    assert guest.received == (b"i" if fifos.stdin else b"")


async def test_stdin_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"i" * 100_000)
    guest = FakeStreams()
    await run(guest, stdin=str(tmp_path / "input"))
    assert guest.received == b"i" * 100_000


@pytest.mark.parametrize("stdin", ["/dev/null", "/"])
async def test_stdin_that_gives_nothing(stdin: str) -> None:
    guest = FakeStreams()
    await run(guest, stdin=stdin)
    assert guest.received == b""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("io/stdout", "is io/stdout, not an absolute path: use /..."),
        ("file://log", "is file://log, not an absolute path: use file:///..."),
        ("fifo:///no/such", "/no/such: No such file or directory"),
        ("/", "/: Is a directory"),
        ("file:///", "/: Is a directory"),
        ("file:///dev/null/log", "/dev/null/log: File exists"),
        ("/" + "x" * 5000, "x: File name too long"),
        ("/a\0b", "/a\0b: embedded null byte"),
        ("//[", "//[: No such file or directory"),
        (
            "binary:///bin/true",
            "has the unknown scheme binary:// in binary:///bin/true: use a fifo's path or fifo://",
        ),
    ],
)
async def test_names_that_make_no_sense(name: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ProcessIO(Stdio(stderr=name), "x")
    assert why in str(refused.value)
    assert str(refused.value).startswith(("stderr of x ", "cannot open stderr of x "))


async def test_outputs_have_room(tmp_path: Path) -> None:
    fifo = make_fifos(tmp_path / "io", "stdout").stdout
    process = ProcessIO(Stdio(stdout=fifo), "x")
    with FifoEnd.reader(fifo) as end:
        assert fcntl.fcntl(end.fd, fcntl.F_GETPIPE_SZ) == 1 << 20
    await process.aclose()


async def test_a_kernel_that_gives_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifo stays as it is, and works."""
    monkeypatch.setattr(host_streams, "_PIPE_BYTES", 1 << 32)
    fifo = make_fifos(tmp_path / "io", "stdout").stdout
    process = ProcessIO(Stdio(stdout=fifo), "x")
    process.start(FakeStreams([b"o"]))
    assert await read_all(fifo) == b"o"
    await process.aclose()


async def test_no_more_descriptors(tmp_path: Path) -> None:
    fifos = make_fifos(tmp_path / "io")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(InvalidRequest, match=r"cannot open stdout of x .*: Too many open files"):
            ProcessIO(Stdio(*fifos), "x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

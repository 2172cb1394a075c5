"""Loggers: small Python programs that a test writes, run as the shim runs them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from shim import logger
from shim.errors import InvalidRequest
from shim.host_streams import parse_uri
from shim.io import ProcessIO, Stdio
from shim.logger import SCHEMES, command
from tests.support import host
from tests.unit.shim.test_shim_io import FakeStreams, open_fds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Program = Callable[[str], str]

# Says when it is ready, and keeps what comes in both pipes.
KEEP = """
os.close(5)
def keep(fd, name):
    with open(folder + name, "wb") as file:
        while data := os.read(fd, 65536):
            file.write(data)
out = threading.Thread(target=keep, args=(3, "out"))
out.start()
keep(4, "err")
out.join()
with open(folder + "end", "w") as file:
    json.dump((sys.argv[1:], dict(os.environ), list(map(int, os.listdir("/proc/self/fd")))), file)
"""


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes a logger with this code; `folder` is the test's."""

    def write(code: str) -> str:
        path = tmp_path / "logger"
        head = f"#!{sys.executable} -ISu\nimport json, os, signal, sys, threading, time\n"
        path.write_text(f"{head}folder = {str(tmp_path)!r} + '/'\n{code}")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before, children = open_fds(), set(host.children(os.getpid()))
    yield
    assert {entry.partition(" ")[0] for entry in open_fds() - before if "pipe:" in entry} == set()
    assert set(host.children(os.getpid())) <= children


async def opened(uri: str, *, terminal: bool = False, stderr: str = "") -> ProcessIO:
    return await ProcessIO.open(Stdio("", uri, stderr, terminal), "container x", owner="x", namespace="ns")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_everything_reaches_the_logger(program: Program, tmp_path: Path, scheme: str) -> None:
    ready = "os.write(5, b'1')\n" if scheme == "binary-v2" else ""
    uri = f"{scheme}://{program(ready + KEEP)}?--tag=a%20b&--verbose&--tag=second&env.LEVEL=info"
    io = await opened(uri, stderr=uri)
    io.start(FakeStreams([b"o" * 100_000, b"1"], [b"e" * 70_000]))
    await io.aclose()
    assert (tmp_path / "out").read_bytes() == b"o" * 100_000 + b"1"
    assert (tmp_path / "err").read_bytes() == b"e" * 70_000
    argv, environment, fds = json.loads((tmp_path / "end").read_text())
    assert argv == ["--tag", "a b", "--verbose", ""]
    told = {"CONTAINER_ID": "x", "CONTAINER_NAMESPACE": "ns", "LEVEL": "info"}
    assert told.items() <= environment.items()
    assert {0, 1, 2, 3, 4} <= set(fds)
    assert len(fds) <= 7  # those, its file, and the listed folder: nothing of the shim's


async def test_a_logger_may_call_itself_anything(program: Program, tmp_path: Path) -> None:
    rename = "with open('/proc/self/comm', 'wb') as name: name.write(b'\\xff) 4 (')\n"
    io = await opened(f"binary://{program(rename + KEEP)}")
    io.start(FakeStreams([b"out"]))
    await io.aclose()
    assert (tmp_path / "out").read_bytes() == b"out"


async def test_stdout_alone_names_it(program: Program, tmp_path: Path) -> None:
    io = await opened(f"binary://{program(KEEP)}")
    io.start(FakeStreams([b"out"], [b"err"]))
    await io.aclose()
    assert (tmp_path / "err").read_bytes() == b"err"


async def test_a_terminal_has_no_stderr(program: Program, tmp_path: Path) -> None:
    io = await opened(f"binary://{program(KEEP)}", terminal=True)
    guest = FakeStreams([b"both"], [b"never asked for"])
    io.start(guest)
    await io.aclose()
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()) == (b"both", b"")


async def test_a_slow_logger_finishes(program: Program, tmp_path: Path) -> None:
    """It does not know of SIGTERM, and reads the last of 300 kB long after the process was deleted."""
    code = KEEP.replace("file.write(data)", "file.write(data); time.sleep(0.05)")
    io = await opened(f"binary://{program(code)}")
    io.start(FakeStreams([bytes(100_000)] * 3))
    await io.aclose()
    assert (tmp_path / "out").stat().st_size == 300_000


async def test_the_guest_is_gone(program: Program, tmp_path: Path) -> None:
    """What came before is still written down."""
    io = await opened(f"binary://{program(KEEP)}")
    guest = FakeStreams([b"last words"], open_ended=True)
    io.start(guest)
    while guest.reads < 3:
        await asyncio.sleep(0)
    io.abort()
    await io.aclose(drain=False)
    assert (tmp_path / "out").read_bytes() == b"last words"


async def test_a_logger_that_waits_for_sigterm(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "_FINISH_LIMIT_S", 0.05)
    code = (
        "signal.signal(15, lambda *_: (open(folder + 'told', 'w'), sys.exit()))\nos.close(5)\nsignal.pause()"
    )
    io = await opened(f"binary://{program(code)}")
    await io.aclose()
    assert (tmp_path / "told").exists()


async def test_a_logger_that_does_not_end(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "_FINISH_LIMIT_S", 0.05)
    monkeypatch.setattr(logger, "_TERMINATE_LIMIT_S", 0.05)
    code = "signal.signal(15, signal.SIG_IGN)\nos.close(5)\nwhile True: signal.pause()"
    io = await opened(f"binary://{program(code)}")
    await io.aclose()


async def test_a_logger_that_dies_does_not_stop_the_process(program: Program) -> None:
    io = await opened(f"binary://{program('os.close(5)' + chr(10) + 'os.read(3, 1)')}")
    guest = FakeStreams([bytes(200_000)] * 5)
    io.start(guest)
    await io.aclose()
    assert guest.reads == 7  # to the end of both


async def test_no_such_logger(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for name, why in (
        ("none", "No such file or directory"),
        ("text", "Permission denied"),
        ("", "Permission denied"),
    ):
        path = f"{tmp_path}/{name}".rstrip("/")
        with pytest.raises(InvalidRequest, match=f"cannot run the logger {path} of container x: {why}$"):
            await opened(f"binary://{path}")


async def test_died_before_it_was_ready(program: Program) -> None:
    path = program("print('no', 'folder', file=sys.stderr)\nsys.exit(3)")
    said = "ended before it was ready: exit status 3: no folder$"
    for scheme in SCHEMES:
        with pytest.raises(InvalidRequest, match=f"the logger {path} of container x {said}"):
            await opened(f"{scheme}://{path}")


async def test_no_byte_of_a_second_version(program: Program) -> None:
    with pytest.raises(InvalidRequest, match="closed descriptor 5 without a byte in it"):
        await opened(f"binary-v2://{program('os.close(5)' + chr(10) + 'signal.pause()')}")


async def test_never_ready(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "_READY_LIMIT_S", 0.1)
    with pytest.raises(
        InvalidRequest, match=r"the logger .* of container x is not ready after 0\.1 s: it has to close"
    ):
        await opened(f"binary://{program('signal.pause()')}")


async def test_a_bad_stdin_beside_a_logger(program: Program) -> None:
    with pytest.raises(InvalidRequest, match="stdin of x has the unknown scheme"):
        await ProcessIO.open(Stdio("a://b", f"binary://{program(KEEP)}"), "x", owner="x", namespace="ns")


async def test_the_shim_ends_first(program: Program, tmp_path: Path) -> None:
    """Its loop cancels what is left: the logger still gets the end, and time to write down what it has."""
    io = await opened(f"binary://{program(KEEP)}")
    guest = FakeStreams([b"all"])
    io.start(guest)
    life = next(task for task in asyncio.all_tasks() if task.get_name().startswith("logger "))
    while guest.reads < 3:  # what came before the end has been written then
        await asyncio.sleep(0)
    life.cancel()
    await asyncio.wait([life])
    assert (tmp_path / "out").read_bytes() == b"all"
    assert (tmp_path / "end").exists()
    await io.aclose()


@pytest.mark.parametrize(
    ("query", "argv", "environment"),
    [
        ("", [], {}),
        ("a=1&b=2&a=3", ["a", "1", "b", "2"], {}),
        ("--x&y=", ["--x", "", "y", ""], {}),
        ("a+b=%26c", ["a b", "&c"], {}),
        ("env.A=1&env.CONTAINER_ID=forged", [], {"A": "1"}),
    ],
)
def test_command(query: str, argv: list[str], environment: dict[str, str]) -> None:
    uri = parse_uri(f"binary:///log%20ger?{query}#f", "stdout", schemes=SCHEMES)
    told = {"CONTAINER_ID": "id", "CONTAINER_NAMESPACE": "ns"}
    assert command(uri, "id", "ns") == (["/log ger", *argv], {**environment, **told})

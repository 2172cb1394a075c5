"""The parts of the engine's wrapper that do not need the engine; containers themselves are tested in a machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from guest_agent.crun import Crun, _failure
from guest_agent.errors import EngineFailed, InvalidRequest, NotFound

if TYPE_CHECKING:
    from pathlib import Path

    from guest_agent.reaper import Reaper

#: A program that prints its arguments' last words where crun would log them, and fails.
REFUSING = "/bin/false"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "executable file `foo` not found in $PATH",
            InvalidRequest,
            'exec: "foo": executable file not found in $PATH',
        ),
        (
            "executable file `foo` not found in $PATH: No such file or directory",
            InvalidRequest,
            'exec: "foo": executable file not found in $PATH',
        ),
        ("mount `x` to `y`: Permission denied", EngineFailed, "mount `x` to `y`: Permission denied"),
    ],
)
def test_sentences_of_crun(text: str, kind: type[Exception], message: str) -> None:
    error = _failure(text)
    assert type(error) is kind
    assert str(error) == message


async def test_starting_is_one_byte_into_the_fifo(reaper: Reaper, tmp_path: Path) -> None:
    crun = Crun(reaper, program=REFUSING, state_dir=str(tmp_path))
    (tmp_path / "c1").mkdir()
    fifo = tmp_path / "c1" / "exec.fifo"
    os.mkfifo(fifo)
    with pytest.raises(NotFound, match="no process of container c1 waits"):
        crun.start("c1")
    waiting = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    crun.start("c1")
    assert os.read(waiting, 10) == b"\0"
    os.close(waiting)
    assert not fifo.exists()
    with pytest.raises(NotFound):
        crun.start("c1")


async def test_a_failing_engine_leaves_no_files(reaper: Reaper, tmp_path: Path) -> None:
    crun = Crun(reaper, program=REFUSING, state_dir=str(tmp_path / "state"))
    crun.prepare()
    before = set(os.listdir("/proc/self/fd"))
    for terminal in (False, True):
        with pytest.raises(EngineFailed, match="crun create ended with status 1"):
            await crun.create("c1", "/bundle", terminal=terminal, pipe_size=0)
        with pytest.raises(EngineFailed, match="crun exec ended with status 1"):
            await crun.exec("c1", {"args": ["true"]}, terminal=terminal, pipe_size=0)
    with pytest.raises(EngineFailed, match="crun update"):
        await crun.update("c1", {})
    assert os.listdir(tmp_path / "state") == []
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_terminal_that_never_comes(reaper: Reaper, tmp_path: Path) -> None:
    crun = Crun(reaper, program="/bin/true", state_dir=str(tmp_path))
    with pytest.raises(EngineFailed, match="sent no terminal"):
        await crun.create("c1", "/bundle", terminal=True, pipe_size=0)
    assert os.listdir(tmp_path) == []


async def test_forgetting(reaper: Reaper, tmp_path: Path) -> None:
    crun = Crun(reaper, program=REFUSING, state_dir=str(tmp_path))
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/status").touch()
    crun.forget("c1")
    crun.forget("c1")
    assert os.listdir(tmp_path) == []

"""The socket of a sandbox: one living shim listens there, and a dead one is no obstacle."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import start

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for a socket's address; nothing in this process may keep a file open."""
    before = os.listdir("/proc/self/fd")
    with tempfile.TemporaryDirectory(prefix="kata-py-s-") as name:
        yield Path(name)
    assert os.listdir("/proc/self/fd") == before


def bind(path: Path) -> socket.socket | None:
    fd = start._bind(str(path), str(path.parent))
    return None if fd is None else socket.socket(fileno=fd)


def test_new(folder: Path) -> None:
    path = folder / "new" / "socket"
    listener = bind(path)
    assert listener
    with listener:
        assert start.is_listening(str(path))
        assert (path.stat().st_mode & 0o777, os.get_inheritable(listener.fileno())) == (0o600, False)
    assert not start.is_listening(str(path))


def test_living_shim_keeps_it(folder: Path) -> None:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        before = path.stat().st_ino
        assert bind(path) is None
        assert path.stat().st_ino == before


def test_start_that_is_under_way_keeps_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound and not yet listening, as at that moment in another process: this is no dead shim's."""
    path = folder / "socket"
    lock = fcntl.flock
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        before = path.stat().st_ino

        def wait_for_the_other(fd: int, operation: int) -> None:
            other.listen()
            lock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", wait_for_the_other)
        assert bind(path) is None
        assert path.stat().st_ino == before


def test_busy_shim_keeps_it(folder: Path) -> None:
    """Its queue of connections is full: it is alive, and waiting for it would hold up every other start."""
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        waiting.connect(str(path))
        assert bind(path) is None


@pytest.mark.parametrize("what", ["socket", "file"])
def test_dead_shim_is_replaced(folder: Path, what: str) -> None:
    path = folder / "socket"
    if what == "file":
        path.write_text("in the way")
    else:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
            dead.listen()
    listener = bind(path)
    assert listener
    with listener:
        assert start.is_listening(str(path))


def test_removal_spares_the_living(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "socket"
    start.remove_dead_socket(str(path))
    start.remove_dead_socket(str(folder / "nowhere" / "socket"))
    lock = fcntl.flock
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(path))

        def wait_for_the_start(fd: int, operation: int) -> None:
            starting.listen()
            lock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", wait_for_the_start)
        start.remove_dead_socket(str(path))
        assert path.exists()
    monkeypatch.undo()
    start.remove_dead_socket(str(path))
    assert not path.exists()


def test_impossible_place(folder: Path) -> None:
    path = folder / ("x" * 120)
    with pytest.raises(OSError, match=f"cannot listen on {path}: .*too long"):
        bind(path)

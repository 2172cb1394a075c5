"""Volumes that guests mount themselves: their descriptions, as storage drivers (CSI) leave them for containers to come.

The layout is Kata's, and so are the words of the description: drivers made for Kata work unchanged.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import NoReturn
from urllib.parse import quote

import msgspec
import typer

from shim import paths
from shim.disk_needs import DIRECT_VOLUMES, MOUNT_INFO, direct_volume_folder, mount_info_from
from shim.management import RESIZE, STATS, ResizeRequest

_ANSWER_LIMIT_S = 60
_ANSWER_BYTES = 64 << 10


def add(path: str, description: str) -> None:
    """Write the description of the volume that containers mount from `path`, in place of an earlier one."""
    _check(path)
    try:
        info = mount_info_from(description.encode())
    except msgspec.MsgspecError as err:
        _fail(f"--mount-info is no description of a volume: {err}")
    if not info.device.startswith("/"):
        _fail(f"--mount-info: device {info.device!r} is not an absolute path")
    folder = direct_volume_folder(path)
    file = f"{folder}/{MOUNT_INFO}"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Whoever reads it meanwhile finds the old one or the new one, and both whole.
        with open(f"{file}.tmp", "w") as new:
            new.write(description)
        os.rename(f"{file}.tmp", file)
    except OSError as err:
        _fail(f"cannot write {file}: {err.strerror}")


def remove(path: str) -> None:
    """Remove the description; containers that have the volume keep it. One that is not there is fine."""
    _check(path)
    folder = direct_volume_folder(path)
    try:
        with suppress(FileNotFoundError):
            os.unlink(f"{folder}/{MOUNT_INFO}")
        with suppress(FileNotFoundError):
            os.rmdir(folder)
    except OSError as err:
        _fail(f"cannot remove {folder}: {err.strerror}")
    with suppress(OSError):  # others have theirs there
        os.rmdir(DIRECT_VOLUMES)


def stats(path: str) -> None:
    """Print what is used of a volume that a container has."""
    _check(path)
    (answer, *_) = _ask(path, f"{STATS}?path={quote(path)}")
    typer.echo(answer.decode())


def resize(path: str, size: str) -> None:
    """Let the file system of a volume grow, in all sandboxes that have it."""
    _check(path)
    if not (size.isascii() and size.isdecimal() and 0 < int(size) < 1 << 63):
        _fail(f"--size {size!r} is not a number of bytes")
    _ask(path, RESIZE, msgspec.json.encode(ResizeRequest(VolumePath=path, Size=int(size))))


class _Connection(HTTPConnection):
    """To the daemon of a sandbox."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWER_LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask(path: str, target: str, body: bytes = b"") -> list[bytes]:
    """The answers of all sandboxes that have the volume."""
    answers = []
    try:
        sandboxes = sorted(os.listdir(paths.RUN_ROOT))
    except FileNotFoundError:
        sandboxes = []
    for sandbox in sandboxes:
        connection = _Connection(paths.management_socket(sandbox))
        try:
            connection.request("POST", target, body)
            response = connection.getresponse()
            text = response.read(_ANSWER_BYTES)
        except (FileNotFoundError, ConnectionRefusedError):
            continue  # it starts, or ends
        except (OSError, HTTPException) as err:
            _fail(f"sandbox {sandbox} does not answer: {err}")
        finally:
            connection.close()
        if response.status == HTTPStatus.OK:
            answers.append(text)
        elif response.status != HTTPStatus.NOT_FOUND:
            _fail(f"volume {path} in sandbox {sandbox}: {text.decode(errors='replace').strip()}")
    if not answers:
        _fail(f"no container that runs here has the direct volume {path}")
    return answers


def _check(path: str) -> None:
    if not path.startswith("/"):
        _fail(f"--volume-path {path!r} is not an absolute path")


def _fail(problem: str) -> NoReturn:
    typer.echo(f"kata-py: {problem}", err=True)
    raise typer.Exit(1)

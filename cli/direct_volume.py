"""Volumes that guests mount themselves: their descriptions, as storage drivers (CSI) leave them for containers to come.

The layout is Kata's, and so are the words of the description: drivers made for Kata work unchanged.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NoReturn

import msgspec
import typer

from shim.disk_needs import DIRECT_VOLUMES, MOUNT_INFO, direct_volume_folder, mount_info_from


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


def _check(path: str) -> None:
    if not path.startswith("/"):
        _fail(f"--volume-path {path!r} is not an absolute path")


def _fail(problem: str) -> NoReturn:
    typer.echo(f"kata-py: {problem}", err=True)
    raise typer.Exit(1)

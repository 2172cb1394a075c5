"""The files of control groups."""

from __future__ import annotations

import errno
import os

from oci_engine.errors import SetupFailed
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.resources_spec import Memory


def read(path: str) -> str:
    """Empty when the kernel does not have the file, or the group is gone."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return ""
        raise


def number(path: str) -> int:
    """0 when it is not there; the highest number for `max`."""
    text = read(path)
    if text == "max":
        return (1 << 64) - 1
    return int(text) if text else 0


def pairs(path: str) -> dict[str, int]:
    """A file of lines `name number`."""
    found = {}
    for line in read(path).splitlines():
        name, _, value = line.rpartition(" ")
        if value.isdigit():
            found[name] = int(value)
    return found


def check_usage(memory: Memory, path: str) -> None:
    """Raises SetupFailed if a new limit would end processes at once, and that is not wanted. `path` has the usage."""
    if memory.check_before_update and memory.limit and memory.limit > 0:
        used = number(path)
        if memory.limit < used:
            raise SetupFailed(
                f"linux.resources.memory.limit: {memory.limit} bytes are less than the {used} that are in use"
                " (checkBeforeUpdate)"
            )


def write(path: str, value: str, what: str) -> None:
    """`what` is the place in the specification that wants it. Raises SetupFailed.

    Not by open(path, "w"), which would ask for a missing file to be made, and hear EACCES instead of ENOENT.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except FileNotFoundError:
        name = os.path.basename(path)
        raise SetupFailed(
            f"{what}: this host cannot do it: there is no {name} in the control group"
        ) from None
    except OSError as err:
        raise SetupFailed(f"{what}: writing {value!r} to {path}: {err.strerror}") from None


def pids_below(path: str) -> list[int]:
    """Of all processes in a group and in those below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(path):
        with suppress(OSError):  # gone meanwhile, or a group of threads, whose processes are shown above it
            found += map(int, read(f"{folder}/cgroup.procs").split())
    return found


def remove_tree(path: str) -> None:
    """Remove a group and those below it. Raises OSError (EBUSY) while a process is in one."""
    for folder, _, _ in os.walk(path, topdown=False):
        with suppress(FileNotFoundError):
            os.rmdir(folder)

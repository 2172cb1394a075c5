"""Mounts whose files have other owners than on their disk: ids mapped anew by a user namespace (Linux 5.12)."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from oci_engine import channel, linux
from oci_engine.errors import SetupFailed
from oci_engine.mountinfo import kind_of_device
from oci_engine.spawn import map_text
from oci_engine.steps import reason
from oci_engine.undo import suppress

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from oci_engine.linux_spec import IdMapping
    from oci_engine.waiting import Wait

    T = TypeVar("T")
    #: Mappings of users and of groups.
    Mappings = tuple[tuple[IdMapping, ...], tuple[IdMapping, ...]]


def new_user_namespace(mappings: Mappings, wait: Wait) -> int:
    """Open on a user namespace that nobody lives in. Raises OSError."""

    def write_maps(pid: int) -> int:
        for file, mapping in zip(("uid_map", "gid_map"), mappings, strict=True):
            fd = os.open(f"/proc/{pid}/{file}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, map_text(mapping).encode())
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    return _with_inhabitant(lambda: linux.unshare(linux.CLONE_NEWUSER), write_maps, wait)


def mappings_of(namespace: int, wait: Wait) -> tuple[str, str]:
    """What an open user namespace maps, as seen from here, each line with single spaces. Raises OSError."""

    def read_maps(pid: int) -> tuple[str, str]:
        texts = []
        for file in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{file}") as maps:
                texts.append("".join(" ".join(line.split()) + "\n" for line in maps))
        return texts[0], texts[1]

    def join() -> None:
        # Who lives there could look into it, and at its files. Without root, neither might the caller then.
        if os.geteuid() == 0:
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
        linux.setns(namespace, linux.CLONE_NEWUSER)

    return _with_inhabitant(join, read_maps, wait)


def _with_inhabitant(enter: Callable[[], None], use: Callable[[int], T], wait: Wait) -> T:
    """Call `use` with the pid of a process that has gone into a user namespace, and end that."""
    ours, theirs = channel.pair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _inhabit(enter, theirs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(theirs)
    try:
        answer = int(os.read(ours, 16) or errno.EIO)
        if answer:
            raise OSError(answer, os.strerror(answer))
        return use(pid)
    finally:
        os.close(ours)
        with suppress(ChildProcessError):
            wait(pid)


def _inhabit(enter: Callable[[], None], fd: int) -> NoReturn:
    """In the child of the fork, until the caller closes its end, or is gone."""
    try:
        try:
            enter()
            answer = 0
        except OSError as err:
            answer = err.errno or errno.EIO
        linux.close_range(0, fd - 1)
        linux.close_range(fd + 1)
        os.write(fd, str(answer).encode())
        os.read(fd, 1)
    finally:
        os._exit(0)


def map_tree(tree: int, namespace: int, *, recursive: bool, place: str, source: str) -> None:
    """Give the files of a detached mount the owners that a user namespace maps theirs to. Raises SetupFailed."""
    try:
        linux.mount_setattr(tree, set_=linux.MOUNT_ATTR_IDMAP, userns=namespace, recursive=recursive)
    except OSError as err:
        if err.errno == errno.EINVAL:
            kind = kind_of_device(os.fstat(tree).st_dev)
            raise SetupFailed(
                f"{place}: ids cannot be mapped anew for {source}: its file system{f' ({kind})' if kind else ''} cannot"
                " do that here; mount it without idmap, uidMappings and gidMappings"
            ) from None
        raise SetupFailed(f"{place}: mapping the ids of {source}: {reason(err)}") from None

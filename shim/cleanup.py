"""Removing what a dead sandbox left on the host, from its record. Every step is harmless when there is nothing to do.

The daemon's mounts live in a mount namespace of its own and vanish with it, and its helper programs are killed by the
kernel when it dies; this is for what outlives a crash: directories, the socket, a daemon that hangs.
"""

import contextlib
import os
import select
import signal
import time

from shim import paths, record

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes too long to import here
    from collections.abc import Callable

# containerd gives `delete` five seconds in all.
_KILL_WAIT_S = 3.0


def clean_up(sandbox_id: str, *, keep_socket: str = "") -> None:
    """Kill the sandbox's daemon and helpers if they still run, and remove its directories and socket.

    `keep_socket` stays: a successor with the same address already listens there.

    Raises:
        OSError: something could not be removed; the message names it.
    """
    owner = record.read(sandbox_id)
    failures = []
    if owner is not None:
        _kill_all([(owner.pid, owner.start_time), *owner.helpers.values()])
        if owner.socket != keep_socket:
            failures += _failure(_unlink, owner.socket)
        failures += _failure(_forget_network, *owner.network)
    failures += _failure(_remove_cgroup, owner.cgroup if owner is not None else overhead_of(sandbox_id))
    failures += _failure(_remove_directory, paths.shared_dir(sandbox_id))
    if failures:
        raise failures[0]  # and the record stays for whoever tries again
    _remove_directory(paths.run_dir(sandbox_id))
    paths.remove_empty_parents()


def _failure(step: "Callable[..., None]", *arguments: object) -> list[OSError]:
    """Take a step that keeps no other one from being taken; the error, if there is one."""
    try:
        step(*arguments)
    except OSError as err:
        return [err]
    return []


def _remove_directory(directory: str) -> None:
    if os.path.lexists(directory):
        unmount_below(directory)
        remove_tree(directory)


def _forget_network(netns: str, ifindexes: list[int]) -> None:
    if ifindexes:
        from shim.network import forget

        forget(netns, ifindexes)


def _remove_cgroup(folders: list[str]) -> None:
    if folders:
        from shim.host_cgroup import empty, remove

        empty(folders, _KILL_WAIT_S)
        remove(folders)


def overhead_of(sandbox_id: str) -> "list[str]":
    """The folders of the control group for overhead of a sandbox whose record is lost, with those of all such groups.
    Mostly there are none: this runs after each sandbox that ended as it should."""
    tops = [paths.CGROUP_ROOT]
    with contextlib.suppress(OSError):
        tops += [f"{tops[0]}/{name}" for name in os.listdir(tops[0])]
    groups = [top + group for group in paths.overhead_groups(sandbox_id) for top in tops]
    found = [group for group in groups if os.path.isdir(group)]
    return found + [os.path.dirname(group) for group in found]


def _kill_all(processes: list[tuple[int, int]]) -> None:
    """SIGKILL those that are still who they were, and wait until they are gone."""
    poller = select.poll()
    waiting: set[int] = set()
    for pid, started in processes:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        # Only now is the identity certain: the descriptor pins whoever has the pid.
        if record.is_alive(pid, started):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poller.register(pidfd, select.POLLIN)
            waiting.add(pidfd)
        else:
            os.close(pidfd)
    deadline = time.monotonic() + _KILL_WAIT_S
    while waiting:
        ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            break
        for fd, _ in ready:
            poller.unregister(fd)
            waiting.discard(fd)
            os.close(fd)


def unmount_below(directory: str) -> None:
    """Detach every mount at or below `directory`, innermost first: removing files through a mount that is still
    there would delete the container's own."""
    inside = _mount_points(directory)
    if not inside:
        return
    from shim.mounts import detach

    for point in inside:
        detach(point)


def _mount_points(directory: str) -> list[str]:
    """Mount points at or below `directory`, innermost first."""
    with open("/proc/self/mountinfo", "rb") as file:
        # The kernel writes white space and backslashes as octal escapes, and all other bytes as they are.
        names = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in file]
    points = [os.fsdecode(name) for name in names]
    inside = [p for p in points if p == directory or p.startswith(f"{directory}/")]
    return sorted(inside, key=len, reverse=True)


def remove_tree(directory: str) -> None:
    """Remove a directory of ours. Somebody else may be doing the same: what is gone already is fine.

    Raises:
        OSError: it cannot be removed, or something is still mounted in it, which would be emptied as well.
    """
    for point in _mount_points(directory):
        raise OSError(16, "cannot remove it while something is mounted in it", point)
    _remove(directory)


def _remove(directory: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(directory)):
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                _unlink(entry.path)
        os.rmdir(directory)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

"""Runs the programs that a specification wants run at points of a container's life."""

from __future__ import annotations

import os
import select

from oci_engine import json_text
from oci_engine.c_modules import signal
from oci_engine.errors import HookFailed
from oci_engine.waiting import wait_for_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.spec import Hook
    from oci_engine.state import Status
    from oci_engine.waiting import Wait

#: Characters of a hook's output that its failure tells.
_OUTPUT = 1000


def state_text(status: Status, state: str) -> str:
    """What hooks read from their standard input."""
    told: dict[str, object] = {
        "ociVersion": status.oci_version, "id": status.id, "status": state, "bundle": status.bundle,
    }  # fmt: skip
    if status.pid:
        told["pid"] = status.pid
    annotations = status.spec.get("annotations")
    if annotations:
        told["annotations"] = annotations
    return json_text.dumps(told)


def of(status: Status, kind: str) -> tuple[Hook, ...]:
    """The hooks of one kind, out of the container's record."""
    if not status.spec.get("hooks"):
        return ()
    from oci_engine.spec import read_spec

    return read_spec(status.spec).hooks[kind]


def seen_from_inside(state: str, status: str) -> str:
    """The state for hooks that the container's own process runs: its pid is what it is in its namespace."""
    return json_text.dumps({**json_text.loads(state), "status": status, "pid": os.getpid()})


def run(hook: Hook, state: str, kind: str, wait: Wait = wait_for_child) -> None:
    """Raises HookFailed when it cannot be run, ends with another status than 0, or takes too long."""
    given, said = os.memfd_create("state"), os.memfd_create("output")
    try:
        os.write(given, state.encode())
        os.lseek(given, 0, os.SEEK_SET)
        try:
            pid = os.posix_spawn(
                hook.path,
                hook.args or (hook.path,),
                # No variables at all where the specification gives none: it says so.
                dict(entry.partition("=")[::2] for entry in hook.env),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, said, 1),
                    (os.POSIX_SPAWN_DUP2, said, 2),
                ],
                setpgroup=0,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )  # fmt: skip
        except OSError as err:
            raise HookFailed(f"{kind} hook {hook.path}: {err.strerror}") from None
        status = _wait(pid, hook, kind, wait)
        if status != 0:
            output = os.pread(said, _OUTPUT, 0).decode(errors="replace").strip()
            raise HookFailed(
                f"{kind} hook {hook.path} ended with status {status}{': ' + output if output else ''}"
            )
    finally:
        os.close(given)
        os.close(said)


def _wait(pid: int, hook: Hook, kind: str, wait: Wait) -> int:
    if hook.timeout_s is not None and not _ends_within(pid, hook.timeout_s):
        os.killpg(pid, signal.SIGKILL)  # what it has started too
        wait(pid)
        raise HookFailed(f"{kind} hook {hook.path} took longer than its {hook.timeout_s} s and was killed")
    return wait(pid)


def _ends_within(pid: int, timeout_s: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:  # and its status is collected already
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)

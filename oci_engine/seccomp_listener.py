"""Hands the listener of a container's filter to the program that answers for its system calls.

That program hears once, over a connection of its own, what the runtime specification calls the container process
state, with the listener as an open file.
"""

from __future__ import annotations

import _socket
import os
import struct

from oci_engine import json_text, linux
from oci_engine.steps import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.seccomp import Seccomp
    from oci_engine.spawn import Spawned


def hand_over(spawned: Spawned, seccomp: Seccomp, state: str) -> None:
    """Wait until the process has its filter, and let it go on under it. `state` is the container's. Raises SetupFailed.

    The process cannot send its listener by itself: its filter may well be about that.
    """
    number = int(str(spawned.wait_for("listener")["number"]))
    with step(f"linux.seccomp.listenerPath: {seccomp.listener_path}"):
        pidfd = os.pidfd_open(spawned.pid)
        try:
            listener = linux.pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
        try:
            _send(
                seccomp.listener_path, _process_state(spawned.pid, seccomp, json_text.loads(state)), listener
            )
        finally:
            os.close(listener)
    spawned.go_on()


def _process_state(pid: int, seccomp: Seccomp, state: dict[str, object]) -> bytes:
    told = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "pid": pid, "state": state}
    if seccomp.listener_metadata:
        told["metadata"] = seccomp.listener_metadata
    return json_text.dumps(told).encode()


def _send(path: str, text: bytes, listener: int) -> None:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(path)
        file = struct.pack("i", listener)
        sent = connection.sendmsg([text], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, file)])
        connection.sendall(text[sent:])
    finally:
        connection.close()

"""When processes were forked, became a program, and ended, as the kernel tells it while it happens.

containerd starts the shim's helpers by itself, and what they cost can only be seen from outside. The kernel's
process connector (drivers/connector/cn_proc.c) reports each step with its own monotonic time stamp, costs the
watched programs nothing and needs no change in them. It needs root in the host's first network namespace.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

# <linux/netlink.h>, <linux/connector.h>, <linux/cn_proc.h>
_NETLINK_CONNECTOR, _CN_IDX_PROC, _CN_VAL_PROC = 11, 1, 1
_LISTEN, _IGNORE = 1, 2
_FORK, _EXEC, _EXIT = 1, 2, 0x80000000
_NLMSGHDR = struct.Struct("=IHHII")
_CN_MSG = struct.Struct("=IIIIHH")
_EVENT = struct.Struct("=IIQ")
_EVENT_AT = _NLMSGHDR.size + _CN_MSG.size
_DETAILS_AT = _EVENT_AT + _EVENT.size
# <asm-generic/socket.h>; Python has no name for it.
_SO_RCVBUFFORCE = 33
_RECEIVE_BYTES = 16 << 20
_ANSWER_LIMIT_S = 1.0


@dataclass
class Life:
    """One process; times are seconds of the monotonic clock, None for what has not happened."""

    pid: int
    parent: int
    forked_s: float
    execed_s: float | None = None
    exited_s: float | None = None


class ProcessEvents:
    """The lives of the processes below `ancestors`, in the order of their births."""

    def __init__(self, *ancestors: int) -> None:
        self._known = set(ancestors)
        self._living: dict[int, Life] = {}
        self._lives: list[Life] = []
        self._changed = threading.Condition()

    def born_since(self, moment_s: float) -> list[Life]:
        """Who was forked at or after a moment."""
        with self._changed:
            return [life for life in self._lives if life.forked_s >= moment_s]

    def wait_for_exit(self, pid: int, timeout_s: float) -> None:
        """Returns when the end of a process has been reported here. Raises BenchError when it has not in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: pid not in self._living, timeout_s):
                raise BenchError(f"process {pid} did not end within {timeout_s:.0f} s")

    def take(self, message: bytes) -> None:
        """One message of the connector."""
        what, _, time_ns = _EVENT.unpack_from(message, _EVENT_AT)
        first, second, third, fourth = struct.unpack_from(
            "=IIII", message.ljust(_DETAILS_AT + 16, b"\0"), _DETAILS_AT
        )
        at = time_ns / 1e9
        with self._changed:
            if what == _FORK and third == fourth and second in self._known:
                # A thread has its process's id as group, a process its own.
                life = Life(pid=third, parent=second, forked_s=at)
                self._known.add(third)
                self._living[third] = life
                self._lives.append(life)
            elif what == _EXEC and first in self._living:
                self._living[first].execed_s = at
            elif what == _EXIT and first == second and first in self._living:
                self._living.pop(first).exited_s = at
                self._known.discard(first)
            self._changed.notify_all()


@contextmanager
def watched(*ancestors: int) -> Iterator[ProcessEvents]:
    """Follow what these processes start, directly or not, for the length of the block.

    Raises BenchError when the kernel does not report processes here.
    """
    events = ProcessEvents(*ancestors)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
            sock.bind((0, _CN_IDX_PROC))
            sock.settimeout(_ANSWER_LIMIT_S)
            _request(sock, _LISTEN)
            sock.recv(4096)
        except OSError as err:
            raise BenchError(f"the kernel does not report processes here: {err}") from err
        stopped, stop = socket.socketpair()
        reader = threading.Thread(
            target=_read, args=(sock, stopped, events), name="process events", daemon=True
        )
        reader.start()
        try:
            yield events
        finally:
            stop.close()
            reader.join()
            stopped.close()
            _request(sock, _IGNORE)


def _request(sock: socket.socket, operation: int) -> None:
    body = struct.pack("=I", operation)
    message = _CN_MSG.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, len(body), 0) + body
    header = _NLMSGHDR.pack(_NLMSGHDR.size + len(message), 3, 0, 0, 0)
    sock.send(header + message)


def _read(sock: socket.socket, stopped: socket.socket, events: ProcessEvents) -> None:
    while True:
        readable, _, _ = select.select([sock, stopped], [], [])
        if stopped in readable:
            return
        # A reader that fell behind loses the events in between (ENOBUFS): what then lacks a time is not used.
        with suppress(OSError):
            events.take(sock.recv(4096))

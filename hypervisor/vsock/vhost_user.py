"""The vhost-user protocol on its socket: messages, file descriptors, replies.

Numbers and layouts are those of QEMU's vhost-user protocol document (docs/interop/vhost-user.rst);
everything is in the machine's byte order, because both ends run on one host. What the requests mean
is left to `backend`.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from enum import IntEnum
from typing import Final

from hypervisor.vsock.errors import FrontEndViolation

F_PROTOCOL_FEATURES: Final = 1 << 30
"""Feature bit by which protocol features are negotiated; no driver ever sees it."""

PROTOCOL_F_MQ: Final = 1 << 0
PROTOCOL_F_REPLY_ACK: Final = 1 << 3
PROTOCOL_F_CONFIG: Final = 1 << 9
PROTOCOL_F_RESET_DEVICE: Final = 1 << 13
PROTOCOL_F_CONFIGURE_MEM_SLOTS: Final = 1 << 15

MAX_PAYLOAD_BYTES: Final = 4096
"""The largest message we know, a memory table of 8 regions, has 264."""
MAX_MESSAGE_FDS: Final = 8

NO_FD: Final = 1 << 8
"""In the payload of SET_VRING_KICK, _CALL and _ERR: no descriptor comes along."""

_HEADER: Final = struct.Struct("=III")  # request, flags, payload bytes
_VERSION: Final = 1
_VERSION_MASK: Final = 3
_FLAG_REPLY: Final = 1 << 2
_FLAG_NEED_REPLY: Final = 1 << 3


class Request(IntEnum):
    """Front-end requests that this back-end answers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class Message:
    """One request with the descriptors that came along, which it owns until `take_fd()`."""

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.need_reply = bool(flags & _FLAG_NEED_REPLY)
        self.payload = payload
        self.fds = fds

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The payload's fields. Raises FrontEndViolation when it is too short."""
        if len(self.payload) < layout.size:
            raise FrontEndViolation(
                f"request {self.request} has {len(self.payload)} bytes; want {layout.size}"
            )
        return layout.unpack_from(self.payload)

    def take_fd(self) -> int:
        """The only descriptor, non-blocking and now the caller's. Raises FrontEndViolation otherwise."""
        if len(self.fds) != 1:
            raise FrontEndViolation(f"request {self.request} has {len(self.fds)} descriptors; want 1")
        os.set_blocking(self.fds[0], False)
        return self.fds.pop()

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """Our end of the connection; never blocks, accepts messages in pieces of any size.

    Owns the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """The next whole message, or None when the socket has no more for now.

        Raises FrontEndViolation for a malformed message, EOFError when the front end hung up, and
        OSError from the socket.
        """
        while (missing := self._missing()) > 0:
            # Never past this message: descriptors belong to the message whose bytes they came with.
            try:
                data, control, flags, _ = self._sock.recvmsg(
                    missing, socket.CMSG_SPACE(MAX_MESSAGE_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            self._keep_fds(control)
            if not data:
                raise EOFError("the front end closed the vhost-user connection")
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_MESSAGE_FDS:
                raise FrontEndViolation(f"a message came with more than {MAX_MESSAGE_FDS} descriptors")
            self._buffer += data
        request, flags, _ = _HEADER.unpack_from(self._buffer)
        payload = bytes(self._buffer[_HEADER.size :])
        fds, self._fds = self._fds, []
        self._buffer.clear()
        return Message(request, flags, payload, fds)

    def reply(self, message: Message, payload: bytes) -> None:
        """Answer `message`. Raises OSError when the front end does not take the answer at once."""
        packet = _HEADER.pack(message.request, _VERSION | _FLAG_REPLY, len(payload)) + payload
        if self._sock.send(packet) != len(packet):
            raise BlockingIOError("the front end does not read its answers")

    def close(self) -> None:
        self._sock.close()
        while self._fds:
            os.close(self._fds.pop())

    def _missing(self) -> int:
        """Bytes to the end of what the buffer holds part of: the header, then the whole message."""
        have = len(self._buffer)
        if have < _HEADER.size:
            return _HEADER.size - have
        request, flags, size = _HEADER.unpack_from(self._buffer)
        if flags & _VERSION_MASK != _VERSION or flags & _FLAG_REPLY:
            raise FrontEndViolation(f"request {request} has flags {flags:#x}; want version 1, not a reply")
        if size > MAX_PAYLOAD_BYTES:
            raise FrontEndViolation(f"request {request} has {size} bytes; at most {MAX_PAYLOAD_BYTES}")
        return _HEADER.size + int(size) - have

    def _keep_fds(self, control: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

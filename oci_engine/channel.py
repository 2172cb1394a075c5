"""What the caller and the new process say to each other: one JSON object in each packet of a socket pair."""

from __future__ import annotations

import _socket
import os

from oci_engine import json_text
from oci_engine.errors import CannotExecute, SetupFailed
from oci_engine.undo import suppress

#: A packet is never longer; texts of errors are cut to fit.
_PACKET = 1 << 16
_TEXT = 4096


class Closed(Exception):
    """The other end is gone."""


def pair() -> tuple[int, int]:
    """Two ends, closed on exec."""
    # Of the C half, whose Python half loads what servers need.
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    return ours.detach(), theirs.detach()


def send(fd: int, **message: object) -> None:
    """Raises Closed."""
    try:
        os.write(fd, json_text.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        raise Closed from None


def receive(fd: int) -> dict[str, object]:
    """Raises Closed at the end, and what the new process failed with."""
    try:
        packet = os.read(fd, _PACKET)
    except ConnectionResetError:
        packet = b""
    if not packet:
        raise Closed
    message: dict[str, object] = json_text.loads(packet.decode())
    if "error" in message:
        text = str(message["error"])
        if "status" in message:
            raise CannotExecute(text, int(str(message["status"])))
        raise SetupFailed(text)
    return message


def send_error(fd: int, text: str, status: int | None = None) -> None:
    """To the caller, or to the standard error if that is gone: then this is a container that was started."""
    message: dict[str, object] = {"error": text[:_TEXT]}
    if status is not None:
        message["status"] = status
    try:
        send(fd, **message)
    except (Closed, OSError):
        with suppress(OSError):
            os.write(2, f"{text[:_TEXT]}\n".encode())

"""The streams of exec, attach and port-forward, over a WebSocket: RFC 6455, and Kubernetes' channels in it.

The first byte of every message names its channel. The server answers `error` once, at the end: a JSON status. A
forwarded port has two channels of its own, of which each begins with the port's number in two bytes.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from types import TracebackType

STDIN, STDOUT, STDERR, ERROR, RESIZE = range(5)
PORT, PORT_ERROR = range(2)
PROTOCOL = "v4.channel.k8s.io"
_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10
_FINAL, _MASKED = 0x80, 0x80
TIMEOUT_S = 30.0


class StreamError(Exception):
    """The server refused, or broke the protocol."""


@dataclass
class Streams:
    """An open connection. What has arrived so far is in `received`, by channel."""

    url: str
    received: dict[int, bytes] = field(default_factory=lambda: dict.fromkeys(range(RESIZE), b""))

    def __enter__(self) -> Streams:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
        self._file = self._socket.makefile("rb")
        try:
            self._upgrade(f"{parts.path}?{parts.query}", parts.netloc)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves, as when kubectl is ended."""
        self._file.close()
        self._socket.close()

    def _upgrade(self, target: str, host: str) -> None:
        lines = [
            f"GET {target} HTTP/1.1",
            f"Host: {host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            f"Sec-WebSocket-Protocol: {PROTOCOL}",
        ]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        status = self._file.readline().decode()
        headers = {}
        while line := self._file.readline().decode().rstrip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if " 101 " not in status:
            raise StreamError(f"{status.strip()}: {self._file.read(1000).decode(errors='replace')}")
        if headers.get("sec-websocket-protocol") != PROTOCOL:
            raise StreamError(f"the server does not speak {PROTOCOL}: {headers}")

    def send(self, data: bytes) -> None:
        """Writes to the process's stdin, or to the port."""
        self._send(_BINARY, bytes([STDIN]) + data)

    def resize(self, *, columns: int, rows: int) -> None:
        """Tells the size of the terminal."""
        self._send(_BINARY, bytes([RESIZE]) + json.dumps({"Width": columns, "Height": rows}).encode())

    def _send(self, kind: int, payload: bytes) -> None:
        length = len(payload)
        if length < 126:
            head = struct.pack("!BB", _FINAL | kind, _MASKED | length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", _FINAL | kind, _MASKED | 126, length)
        else:
            head = struct.pack("!BBQ", _FINAL | kind, _MASKED | 127, length)
        # A client has to mask what it sends; the mask of zeros leaves it as it is.
        self._socket.sendall(head + bytes(4) + payload)

    def _receive(self) -> bool:
        """Takes in one frame; False at the end of the connection."""
        try:
            head = self._file.read(2)
        except TimeoutError:
            raise StreamError(f"nothing for {TIMEOUT_S:.0f} s: {self.received}") from None
        if len(head) < 2:
            return False
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", self._file.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self._file.read(8))
        payload = self._file.read(length)
        kind = head[0] & 0x0F
        if kind == _CLOSE:
            return False
        if kind == _PING:
            self._send(_PONG, payload)
        elif kind == _BINARY and payload:
            self.received[payload[0]] += payload[1:]
        elif kind != _BINARY:
            raise StreamError(f"a frame of kind {kind}")
        return True

    def wait_for(self, text: bytes, channel: int = STDOUT) -> bytes:
        """Everything of the channel, as soon as the text is in it. Raises StreamError when the end comes before."""
        while text not in self.received[channel]:
            if not self._receive():
                raise StreamError(f"the end came before {text!r}: {self.received}")
        return self.received[channel]

    def finish(self) -> int:
        """Reads to the end; the command's exit status. Raises StreamError for any other kind of failure."""
        while self._receive():
            pass
        status: dict[str, Any] = json.loads(self.received[ERROR] or b'{"status": "none"}')
        if status["status"] == "Success":
            return 0
        causes = (status.get("details") or {}).get("causes") or []
        codes = [cause["message"] for cause in causes if cause.get("reason") == "ExitCode"]
        if not codes:
            raise StreamError(f"no exit status: {status}")
        return int(codes[0])

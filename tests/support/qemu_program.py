"""What the fake QEMU runs: QMP on the socket it inherits, and nothing else. Only the standard library.

Behaviours: "serve" answers; "exit" writes a line to stderr and ends with status 1; "silent" never answers; "signal"
is killed by a signal in the middle of the handshake.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def main(argv_file: str, behaviour: str, detail: str) -> None:
    """Behave as told until killed; `argv_file` gets the arguments."""
    with open(argv_file, "w") as file:
        json.dump(sys.argv, file)
    if behaviour == "exit":
        sys.exit(detail)
    found = re.search(r"id=qmp,fd=(\d+)", " ".join(sys.argv))
    assert found
    listener = socket.socket(fileno=int(found[1]))
    while behaviour == "silent":
        signal.pause()
    while True:
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError):  # who lost patience may connect again
            _converse(connection, int(detail) if behaviour == "signal" else None)


def _converse(connection: socket.socket, death: int | None) -> None:
    def say(message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\r\n")

    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fake"}
    say({"QMP": {"version": version, "capabilities": []}})
    for request in _requests(connection):
        if death is not None and request["execute"] == "qmp_capabilities":
            os.kill(os.getpid(), death)
        answer: object = {"status": "running"} if request["execute"] == "query-status" else {}
        if request["execute"] == "query-cpus-fast":
            answer = [{"cpu-index": 0, "thread-id": os.getpid(), "qom-path": "/machine/cpu0"}]
        say({"return": answer, "id": request.get("id")})


def _requests(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """JSON objects one after the other: a client need not end its lines."""
    text = ""
    while data := connection.recv(4096):
        text += data.decode()
        while text := text.lstrip():
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield request

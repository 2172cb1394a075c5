"""Runs in the machine, as the one service of it: programs that the host asks for, one after the other.

A request is a line of JSON on the machine's serial port: `argv`, `folder`, `environment`, `limit_s`. What the program
writes comes back as it is written, in pieces of `O`, four bytes of length, the bytes; its end is an `E` and four bytes
of its status. Nothing but the standard library is imported: it starts in the interpreter of the system.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

NAME = "node"
PIECE = struct.Struct(">cI")
OUTPUT, END = b"O", b"E"


def port() -> Path:
    """The serial port that the host has named; without udev there is no link of that name."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == NAME:
            return Path("/dev", entry.name)
    sys.exit(f"servant: this machine has no virtio port {NAME}")


def main() -> None:
    with open(port(), "r+b", buffering=0) as line:
        send(line.fileno(), END, 0)  # it is up
        pending = b""
        while data := os.read(line.fileno(), 65536):
            pending += data
            while b"\n" in pending:
                request, _, pending = pending.partition(b"\n")
                run(line.fileno(), json.loads(request))


def run(line: int, request: dict[str, Any]) -> None:
    """One program, in a session of its own, with all that it leaves there ended behind it."""
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            request["argv"],
            cwd=request["folder"],
            env=request["environment"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
        )
    except OSError as err:
        os.close(writer)
        os.close(reader)
        send(line, OUTPUT, f"{err}\n".encode())
        send(line, END, 127)
        return
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(request["limit_s"])
    while data := os.read(reader, 65536):
        send(line, OUTPUT, data)
    os.close(reader)
    status = process.wait()
    signal.alarm(0)
    send(line, END, status if status >= 0 else 128 - status)


def send(line: int, kind: bytes, value: bytes | int) -> None:
    data = memoryview(
        PIECE.pack(kind, value) if isinstance(value, int) else PIECE.pack(kind, len(value)) + value
    )
    while data:
        data = data[os.write(line, data) :]


if __name__ == "__main__":
    main()

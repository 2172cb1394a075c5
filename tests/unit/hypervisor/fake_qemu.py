"""A QEMU that speaks QMP and nothing else. Its behaviour is the word at the end of its file name.

A test links this file as `qemu-<behaviour>`: the environment of helpers is empty and QEMU's arguments are ours.
It runs without `site` and imports little: it starts in some 15 ms.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}
}
behaviour = os.path.basename(sys.argv[0]).removeprefix("qemu-")
arguments = " ".join(sys.argv[1:])


def inherited(chardev: str) -> socket.socket:
    match = re.search(rf"socket,id={chardev},fd=(\d+)", arguments)
    assert match
    return socket.socket(fileno=int(match[1]))


def serve(peer: socket.socket) -> None:
    peer.sendall(json.dumps(GREETING).encode() + b"\r\n")
    status = "running"
    while data := peer.recv(65536):
        message = json.loads(data)
        command = message["execute"]
        reply: dict[str, object] = {}
        if command == "stop" and behaviour == "leaves":
            print("qemu-system: something broke", file=sys.stderr)
            sys.exit(3)
        if command == "stop":
            status = "paused"
        elif command == "cont":
            status = "running"
        elif command == "query-status":
            reply = {"status": status}
        peer.sendall(json.dumps({"return": reply, "id": message.get("id")}).encode() + b"\r\n")
        if command == "qmp_capabilities" and behaviour == "shuts":
            words = {"guest": True, "reason": "guest-shutdown"}
            event = {"event": "SHUTDOWN", "data": words, "timestamp": {"seconds": 1, "microseconds": 2}}
            peer.sendall(json.dumps(event).encode() + b"\r\n")


def main() -> None:
    console, monitor = inherited("console"), inherited("qmp")
    if behaviour == "fails":
        print("qemu-system: -machine nonsense: unsupported machine type", file=sys.stderr)
        print("Use -machine help to list supported machines", file=sys.stderr)
        sys.exit(1)
    if behaviour == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "deaf":
        signal.pause()
    if behaviour == "late":
        for _ in range(2):  # two connections are dropped, the third is served
            monitor.accept()[0].close()
    if behaviour == "panics":
        console.sendall(
            b"[    1.0] Run /init as init process\r\n[    1.1] Kernel panic - not syncing: no init\r\n"
        )
        sys.exit(0)
    if behaviour == "gives up":
        console.sendall(b"guest image: cannot mount\r\n[    1.1] reboot: Restarting system\r\n")
        sys.exit(0)
    if behaviour == "floods":
        console.sendall(b"".join(b"line %d\n" % n for n in range(100_000)) + b"end\n")
    while True:
        connection = monitor.accept()[0]
        with contextlib.suppress(ConnectionError):  # a client that gave up: the next one is served
            serve(connection)


if __name__ == "__main__":
    main()

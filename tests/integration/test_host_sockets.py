"""Unix sockets of the host for containers: refused as a rule, reached with `proxy_host_sockets`."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.containerd import Containerd

pytestmark = [pytest.mark.one_version, pytest.mark.usefixtures("restored_configuration")]
# Run by the host's Python, which the container sees: connects as often as it is told, with all connections at once, and
# each sends its bytes, ends its direction, and compares the answer.
CLIENT = """
import os, socket, sys, threading
path, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ready, good = threading.Barrier(count), []
def talk():
    data = os.urandom(size)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        ready.wait()
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while piece := sock.recv(65536):
            answer += piece
    good.append(answer == data[::-1])
threads = [threading.Thread(target=talk) for _ in range(count)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(path, len(good), all(good))
"""


async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read()
    writer.write(data[::-1])
    await writer.drain()
    writer.close()


@contextmanager
def serving(path: Path) -> Iterator[None]:
    """A server that answers with the same bytes in reverse order, when all are there."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_unix_server(reverse, path, limit=1 << 22))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()


def test_a_container_talks_to_a_server_of_the_host(containerd: Containerd, tmp_path: Path) -> None:
    host, sockets = tmp_path / "host", tmp_path / "run"
    for folder in (host / "usr", host / "run", sockets / "below"):
        folder.mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (host / name).symlink_to(f"usr/{name}")
    (host / "client.py").write_text(CLIENT)
    (host / "app.sock").touch()
    client = "chroot /host /usr/bin/python3 -S /client.py"
    script = (
        f"{client} /app.sock 1 1048576; {client} /run/dir.sock 30 20000; {client} /run/below/it.sock 1 10; "
        "stat -c '%F %a %u' /host/run/dir.sock"
    )
    with serving(sockets / "app.sock"), serving(sockets / "dir.sock"), serving(sockets / "below" / "it.sock"):
        os.chown(sockets / "dir.sock", 7, 7)
        (sockets / "dir.sock").chmod(0o660)
        mounts = [
            "--mount", f"type=bind,src={host},dst=/host,options=rbind:ro",
            "--mount", "type=bind,src=/usr,dst=/host/usr,options=rbind:ro",
            "--mount", f"type=bind,src={sockets / 'app.sock'},dst=/host/app.sock,options=rbind:rw",
            "--mount", f"type=bind,src={sockets},dst=/host/run,options=rbind:rw",
        ]  # fmt: skip
        refused = containerd.run("sh", "-c", f"{client} /run/dir.sock 1 1", options=["--rm", *mounts])
        assert "ConnectionRefusedError" in refused.stderr
        text = containerd.config.read_text()
        containerd.config.write_text(f"{text}\n[runtime]\nproxy_host_sockets = true\n")
        done = containerd.run("sh", "-c", script, options=["--rm", *mounts])
    assert done.stdout.splitlines() == [
        "/app.sock 1 True", "/run/dir.sock 30 True", "/run/below/it.sock 1 True", "socket 660 7",
    ], done.stderr  # fmt: skip

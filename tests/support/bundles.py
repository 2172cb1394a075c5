"""OCI bundles and FIFOs as containerd makes them."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def process(args: Sequence[str], *, env: Sequence[str] = (), cwd: str = "/") -> dict[str, Any]:
    """An OCI process."""
    user = {"uid": 0, "gid": 0}
    return {"terminal": False, "user": user, "args": list(args), "env": [_PATH, *env], "cwd": cwd}


def shell(script: str) -> dict[str, Any]:
    """An OCI process that runs a shell script."""
    return process(["/bin/sh", "-c", script])


def spec(init: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An OCI runtime spec as `ctr run` writes it, without the parts that no test reads."""
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    return {
        "ociVersion": "1.1.0",
        "process": init,
        "root": {"path": "rootfs"},
        "hostname": "fake",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "linux": {"namespaces": namespaces},
        **more,
    }


def pod(kind: str, sandbox_id: str) -> dict[str, str]:
    """The annotations by which containerd's CRI plugin tells what a container is: "sandbox" or "container"."""
    return {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox_id}


def make_bundle(folder: Path, config: dict[str, Any]) -> Path:
    """A bundle with a root file system and the FIFO for the shim's log."""
    (folder / "rootfs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    os.mkfifo(folder / "log", 0o600)
    return folder


class Fifos(NamedTuple):
    """Paths for a process's streams; empty ones are not there."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""


def make_fifos(folder: Path, *names: str) -> Fifos:
    """FIFOs in a new folder, by default all three."""
    folder.mkdir(parents=True)
    paths = {name: str(folder / name) for name in names or Fifos._fields}
    for path in paths.values():
        os.mkfifo(path, 0o600)
    return Fifos(**paths)


class FifoEnd:
    """A client's end of a FIFO, which never blocks the loop. A context manager."""

    def __init__(self, path: str, flags: int) -> None:
        self.fd = os.open(path, flags | os.O_NONBLOCK)

    @classmethod
    def reader(cls, path: str) -> FifoEnd:
        return cls(path, os.O_RDONLY)

    @classmethod
    def writer(cls, path: str) -> FifoEnd:
        """Raises OSError (ENXIO) while nobody reads."""
        return cls(path, os.O_WRONLY)

    def __enter__(self) -> FifoEnd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. Harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def read(self, size: int) -> bytes:
        """The next bytes; empty at the end of the stream."""
        while True:
            try:
                return os.read(self.fd, size)
            except BlockingIOError:
                await self._ready(write=False)

    async def read_to_end(self, size: int = 1 << 16) -> bytes:
        """All bytes up to the end of the stream, `size` at a time."""
        chunks = []
        while chunk := await self.read(size):
            chunks.append(chunk)
        return b"".join(chunks)

    async def read_exactly(self, count: int) -> bytes:
        """So many bytes. Raises AssertionError at an early end."""
        data = b""
        while len(data) < count:
            chunk = await self.read(count - len(data))
            assert chunk, f"the stream ended after {data!r}"
            data += chunk
        return data

    async def write(self, data: bytes) -> None:
        """All of the bytes."""
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                await self._ready(write=True)

    async def _ready(self, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        (loop.add_writer if write else loop.add_reader)(self.fd, ready.set)
        try:
            await ready.wait()
        finally:
            (loop.remove_writer if write else loop.remove_reader)(self.fd)


async def read_all(path: str) -> bytes:
    """What comes out of a FIFO from now on to its end. There must be a writer, or data in it."""
    with FifoEnd.reader(path) as end:
        return await end.read_to_end()

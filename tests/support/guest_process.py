"""A process of the fake guest: a real process of this host, with pipes for its streams."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.support import host

if TYPE_CHECKING:
    from agent_proto.gen.oci_pb2 import Process as OciProcess


class GuestProcess:
    """Created with its spec, started later; `exited` is its exit status, 128 plus the signal's number if killed."""

    def __init__(self, spec: OciProcess) -> None:
        self.spec = spec
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._popen: subprocess.Popen[bytes] | None = None
        self._ends: dict[str, int] = {}
        self._pidfd = -1

    def start(self) -> None:
        """Run it. Raises OSError when there is no such program."""
        popen = subprocess.Popen(
            list(self.spec.Args),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=dict(word.split("=", 1) for word in self.spec.Env),
            cwd=self.spec.Cwd or "/",
            start_new_session=True,
        )  # fmt: skip
        assert popen.stdin and popen.stdout and popen.stderr
        streams = {"stdin": popen.stdin, "stdout": popen.stdout, "stderr": popen.stderr}
        for name, stream in streams.items():
            with stream:
                self._ends[name] = os.dup(stream.fileno())
            os.set_blocking(self._ends[name], False)
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        """Its pid on this host; 0 before it was started."""
        return 0 if self._popen is None else self._popen.pid

    def members(self) -> list[int]:
        """The running pids of it and of what it started, its own first."""
        return sorted(host.process_group(self.pid)) if self.pid else []

    async def read(self, stream: str, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; empty at the end."""
        while stream in self._ends:
            try:
                return os.read(self._ends[stream], size)
            except BlockingIOError:
                await self._ready(stream, write=False)
        return b""

    async def write(self, data: bytes) -> int:
        """Write some of it, as soon as there is room. Raises BrokenPipeError when nobody reads."""
        while "stdin" in self._ends:
            try:
                return os.write(self._ends["stdin"], data)
            except BlockingIOError:
                await self._ready("stdin", write=True)
        raise BrokenPipeError("stdin is closed")

    def close_stdin(self) -> None:
        """Let the process see the end of its input. Harmless when repeated."""
        if "stdin" in self._ends:
            os.close(self._ends.pop("stdin"))

    def signal(self, number: int, *, group: bool = False) -> None:
        """Signal the process, or everything it started as well. One that never ran dies of any signal."""
        if self._popen is None:
            self._set_exited(128 + number)
        else:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self._popen.pid, number)

    async def aclose(self) -> None:
        """Kill it with everything it started, and let go of its streams."""
        if self._popen is not None:
            members = self.members()
            self.signal(signal.SIGKILL, group=True)
            await self.exited
            for pid in members:
                await host.ended(pid)
        for end in self._ends.values():
            os.close(end)
        self._ends.clear()

    async def _ready(self, stream: str, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        fd = self._ends[stream]
        (loop.add_writer if write else loop.add_reader)(fd, ready.set)
        try:
            await ready.wait()
        finally:
            (loop.remove_writer if write else loop.remove_reader)(fd)

    def _on_exit(self) -> None:
        assert self._popen is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._popen.wait()
        self._set_exited(status if status >= 0 else 128 - status)

    def _set_exited(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)

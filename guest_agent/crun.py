"""The container engine, as the rest of the agent sees it; behind this interface it is the program `crun`.

Starting a program is most of what an engine run costs under emulation, so it is run only to create, to exec and to
update. Starting is a byte written to the FIFO that the created process waits on; signals, pausing and cleaning up
go to the kernel directly.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from typing import TYPE_CHECKING

from guest_agent import spawn
from guest_agent.errors import EngineFailed, InvalidRequest, NotFound
from guest_agent.jsontext import dumps
from guest_agent.stdio import Stdio

if TYPE_CHECKING:
    import asyncio

    from guest_agent.oci import Json
    from guest_agent.reaper import Reaper

PROGRAM = "/usr/bin/crun"
STATE_DIR = "/run/kata-py/crun"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
#: Sentences of crun 1.8 to 1.28, and what they mean for the caller.
_MISSING_PROGRAM = ("executable file", "not found")


class Started:
    """A process the engine made: its pid, its exit code to come, its streams."""

    __slots__ = ("exited", "pid", "stdio")

    def __init__(self, pid: int, exited: asyncio.Future[int], stdio: Stdio) -> None:
        self.pid = pid
        self.exited = exited
        self.stdio = stdio


class Crun:
    """crun with its state in one directory."""

    def __init__(self, reaper: Reaper, *, program: str = PROGRAM, state_dir: str = STATE_DIR) -> None:
        self._reaper = reaper
        self._program = program
        self._state_dir = state_dir
        self._memory_fd = -1
        self._runs = 0

    def prepare(self) -> None:
        """What the first run would otherwise have to do."""
        os.makedirs(self._state_dir, mode=0o700, exist_ok=True)
        self._executable()

    async def create(self, container_id: str, bundle: str, *, terminal: bool, pipe_size: int) -> Started:
        """Make the container of a bundle; its process waits for `start`. Raises EngineFailed, InvalidRequest."""
        words = ["create", "--no-new-keyring", "--bundle", bundle]
        return await self._run_for_process(words, container_id, terminal, pipe_size)

    def start(self, container_id: str) -> None:
        """Let the created process run its program. Raises NotFound when nothing waits to be started."""
        path = f"{self._state_dir}/{container_id}/exec.fifo"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as err:
            if err.errno in (errno.ENXIO, errno.ENOENT):
                raise NotFound(f"no process of container {container_id} waits to be started") from err
            raise
        try:
            os.write(fd, b"\0")
        finally:
            os.close(fd)
        os.unlink(path)

    async def start_with_hooks(self, container_id: str) -> None:
        """Like `start`, but by the engine itself, which also runs the poststart hooks. Raises EngineFailed."""
        await self._run(["start", container_id], (0, 1, 2))

    async def exec(self, container_id: str, process: Json, *, terminal: bool, pipe_size: int) -> Started:
        """Run another process in a running container. Raises EngineFailed, InvalidRequest, NotFound."""
        path = self._scratch("process")
        with open(path, "w") as file:
            file.write(dumps(process))
        try:
            words = ["exec", "--detach", "--process", path]
            return await self._run_for_process(words, container_id, terminal, pipe_size)
        finally:
            os.unlink(path)

    async def update(self, container_id: str, resources: Json) -> None:
        """Change the limits of a container. Raises EngineFailed."""
        path = self._scratch("resources")
        with open(path, "w") as file:
            file.write(dumps(resources))
        try:
            await self._run(["update", "--resources", path, container_id], (0, 1, 2))
        finally:
            os.unlink(path)

    async def delete_with_hooks(self, container_id: str) -> None:
        """Remove a stopped container by the engine itself, which also runs the poststop hooks."""
        await self._run(["delete", "--force", container_id], (0, 1, 2))

    def forget(self, container_id: str) -> None:
        """Remove what the engine knows of a container whose processes and cgroup are gone."""
        directory = f"{self._state_dir}/{container_id}"
        if os.path.isdir(directory):
            for name in os.listdir(directory):
                os.unlink(f"{directory}/{name}")
            os.rmdir(directory)

    async def _run_for_process(
        self, words: list[str], container_id: str, terminal: bool, pipe_size: int
    ) -> Started:
        pid_file = self._scratch("pid")
        words = [*words, "--pid-file", pid_file]
        with self._reaper.births():
            try:
                if terminal:
                    stdio = await self._with_terminal([*words, "--console-socket"], container_id)
                else:
                    stdio, theirs = Stdio.pipes(pipe_size)
                    try:
                        with theirs:
                            await self._run([*words, container_id], theirs.fds)
                    except BaseException:
                        stdio.close()
                        raise
                with open(pid_file) as file:
                    pid = int(file.read())
            finally:
                _unlink_if_there(pid_file)
            return Started(pid, self._reaper.watch(pid), stdio)

    async def _with_terminal(self, words: list[str], container_id: str) -> Stdio:
        """The engine opens the terminal inside the container and sends us its controlling side."""
        path = self._scratch("console")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            listener.bind(path)
            try:
                listener.listen(1)
                await self._run([*words, path, container_id], (0, 1, 2))
                # It has connected and sent before it ended, so nothing here waits.
                listener.setblocking(False)
                connection, _ = listener.accept()
            except BlockingIOError as err:
                raise EngineFailed(f"crun sent no terminal for container {container_id}") from err
            finally:
                os.unlink(path)
        with connection:
            return Stdio.terminal(_receive_fd(connection))

    async def _run(self, words: list[str], fds: tuple[int, int, int]) -> None:
        log = self._scratch("log")
        argv = ["crun", "--root", self._state_dir, "--cgroup-manager", "cgroupfs", "--log", log, *words]
        try:
            code = await spawn.run(self._reaper, self._executable(), argv, fds)
            if code != 0:
                raise _failure(_last_line(log) or f"crun {words[0]} ended with status {code}")
        finally:
            _unlink_if_there(log)

    def _scratch(self, kind: str) -> str:
        self._runs += 1
        return f"{self._state_dir}/.{kind}-{self._runs}"

    def _executable(self) -> str:
        """crun runs itself again from a sealed memory file when it is not started from one, so that no container
        can write to the program on disk. Started from one, it saves the second start."""
        if self._memory_fd < 0:
            fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(self._program, "rb") as program:
                while os.sendfile(fd, program.fileno(), None, 1 << 24):
                    pass
            os.fchmod(fd, 0o755)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            # A file that is open for writing cannot be executed.
            self._memory_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(fd)
        return f"/proc/self/fd/{self._memory_fd}"


def _failure(text: str) -> Exception:
    if all(words in text for words in _MISSING_PROGRAM):
        quoted = text.split("`")[1] if text.count("`") >= 2 else text
        return InvalidRequest(f'exec: "{quoted}": executable file not found in $PATH')
    return EngineFailed(text)


def _last_line(path: str) -> str:
    """crun's last sentence, without what its log puts in front."""
    try:
        with open(path, errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""


def _receive_fd(connection: socket.socket) -> int:
    _data, control, _flags, _address = connection.recvmsg(1024, socket.CMSG_SPACE(4))
    for _level, kind, data in control:
        if kind == socket.SCM_RIGHTS:
            return int.from_bytes(data[:4], sys.byteorder)
    raise EngineFailed("crun sent no terminal")


def _unlink_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return

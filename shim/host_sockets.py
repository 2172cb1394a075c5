"""Unix sockets of the host that containers may connect to, when `proxy_host_sockets` says so.

A socket that is shared is a socket in the guest too, but nobody listens there. So the guest's agent makes one that
stands for it; who connects to that is connected, over vsock and by this process, to the host's.

What is connected to is the socket that was found when the container was made, by a descriptor of it. A path would be
looked up later, in directories that the guest can change: it could lead anywhere on the host by then.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from agent_proto.gen.kata_py_agent_pb2 import AcceptConnectionRequest, CloseSocketRequest, ListenSocketRequest
from agent_proto.relay import SOCKETS_PORT, TOKEN_BYTES, relay
from shim.aside import aside
from shim.errors import NotSupported
from shim.share import GUEST_PASSTHROUGH
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import ExitStack
    from pathlib import Path

    from agent_proto.gen.oci_pb2 import Spec as OciSpec
    from hypervisor.vsock.base import Vsock
    from shim.background import InBackground
    from shim.guest import Guest
    from shim.share import SharedDir

log = structlog.get_logger()

GUEST_DIR = "/run/kata-containers/sandbox/sockets"
# Of all containers of a sandbox together. More programs wait until one of these has ended.
CONNECTIONS = 256
# Where directories are searched: so deep, and so many names in one directory of a container.
DEPTH, NAMES = 4, 4096
SOCKETS = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# How long a server may leave a connection in its queue.
_CONNECT_LIMIT_S = 10
# How many at once wait for that, each in a thread: fewer than the event loop has for everything (five or more).
_WAITING = 4
_GUEST_LIMIT_S = 30.0
# How long connections may go on when their container is gone, with its programs.
_LAST_WORDS_S = 30.0


class Found(NamedTuple):
    """A socket: where it is below the directory that was searched ("" is itself), and a descriptor of it."""

    place: str
    fd: int


def find(path: Path) -> Iterator[Found]:
    """The sockets at or below a path. The descriptors are the caller's.

    Raises:
        OSError: nothing is there.
    """
    top = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(top).st_mode)
    if kind == stat.S_IFSOCK:
        yield Found("", top)
        return
    try:
        if kind == stat.S_IFDIR:
            search = _Search()
            yield from search.below(top, ".", "", DEPTH)
            if search.gave_up:
                log.warning(
                    "sockets_not_all_found", path=str(path), names=NAMES, sockets=SOCKETS, depth=DEPTH
                )
    finally:
        os.close(top)


def _find_all(path: Path) -> list[Found]:
    found: list[Found] = []
    try:
        found.extend(find(path))
    except BaseException:
        _close_all(found)
        raise
    return found


def _close_all(found: Iterable[Found]) -> None:
    for _, fd in found:
        os.close(fd)


class _Search:
    def __init__(self) -> None:
        self._names, self._sockets = NAMES, SOCKETS
        self.gave_up = False

    def below(self, parent: int, name: str, place: str, depth: int) -> Iterator[Found]:
        # Never by a path: what is a directory now may be a link to anywhere a moment later.
        folder = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._names -= 1
                    if self._names < 0 or self._sockets <= 0:
                        self.gave_up = True
                        return
                    here = f"{place}{entry.name}"
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            if depth == 1:
                                self.gave_up = True
                            else:
                                yield from self.below(folder, entry.name, f"{here}/", depth - 1)
                        elif not entry.is_file(follow_symlinks=False) and not entry.is_symlink():
                            yield from self._socket(folder, entry.name, here)
                    except OSError as err:
                        log.debug("not_searched_for_sockets", place=here, error=str(err))
        finally:
            os.close(folder)

    def _socket(self, folder: int, name: str, place: str) -> Iterator[Found]:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._sockets -= 1
            yield Found(place, fd)
        else:
            os.close(fd)


class _Way:
    """A socket of the host that the guest reaches for now, by a descriptor of it. `end` is when its connections end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.end: float | None = None
        self.connections: set[asyncio.Timeout] = set()


class HostSockets:
    """The sockets that one guest's containers reach."""

    def __init__(self, guest: Guest, vsock: Vsock, in_background: InBackground) -> None:
        self._guest = guest
        self._vsock = vsock
        self._in_background = in_background
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._waiting = asyncio.Semaphore(_WAITING)
        # Sockets whose server refused: a guest that tries again and again writes no more into the log.
        self._refused: set[str] = set()
        # By the names of the guest's sockets. What is not here any more no guest reaches, whatever its agent says.
        self._ways: dict[str, _Way] = {}

    async def offer_mounted(self, spec: OciSpec, share: SharedDir, undo: ExitStack) -> None:
        """Let a container reach the sockets that it mounts, and those in the directories that it mounts. Raises as
        `offer`, and OSError."""
        mounts = list(spec.Mounts)
        del spec.Mounts[:]
        for mount in mounts:
            spec.Mounts.append(mount)
            if not mount.source.startswith(f"{GUEST_PASSTHROUGH}/"):
                continue
            found = await aside(partial(_find_all, share.on_host(mount.source)), unwanted=_close_all)
            try:
                while found:
                    place, fd = found.pop(0)
                    path = f"{mount.destination.rstrip('/')}/{place}".rstrip("/")
                    source = await self.offer(fd, f"{path} of the container", undo)
                    if place:
                        spec.Mounts.add(destination=path, type="bind", source=source, options=["bind"])
                    else:
                        spec.Mounts[-1].source = source
            finally:
                _close_all(found)

    async def offer(self, fd: int, source: str, undo: ExitStack) -> str:
        """The guest's path of a socket that stands for the one behind `fd`, which belongs to this from now on. `source`
        is what the user knows it by.

        Raises:
            NotSupported: the guest's agent has no such sockets.
            RpcError: it refused, or is gone.
        """
        name = os.urandom(8).hex()
        info = os.fstat(fd)
        request = ListenSocketRequest(
            name=name, mode=stat.S_IMODE(info.st_mode), uid=info.st_uid, gid=info.st_gid
        )
        try:
            await self._listen(request)
        except BaseException:
            os.close(fd)
            raise
        undo.callback(self._release, name)
        self._ways[name] = _Way(fd)
        self._in_background(self._serve(name, source), f"socket {source}")
        return f"{GUEST_DIR}/{name}"

    async def _listen(self, request: ListenSocketRequest) -> None:
        try:
            if await self._guest.extended():
                await self._guest.agent.listen_socket(request)
                return
        except RpcError as err:
            if err.code is not Code.UNIMPLEMENTED:
                raise
        raise NotSupported(
            "proxy_host_sockets of [runtime] is set, and the guest's agent has no sockets for the host's; remove it, "
            "or use kata-py's own guest of this version"
        )

    def _release(self, name: str) -> None:
        self._shut(name)
        self._in_background(self._close(name), f"close socket {name}")

    def _shut(self, name: str) -> None:
        way = self._ways.pop(name, None)
        if way is not None:
            os.close(way.fd)
            # The last words of programs that have ended may be on their way still.
            way.end = asyncio.get_running_loop().time() + _LAST_WORDS_S
            for limit in way.connections:
                limit.reschedule(way.end)

    async def _serve(self, name: str, source: str) -> None:
        """Take the programs that connect, one after the other."""
        try:
            while True:
                reply = await self._guest.agent.accept_connection(AcceptConnectionRequest(name=name))
                if len(reply.token) != TOKEN_BYTES:
                    log.warning(
                        "host_socket_closed", source=source, reason="the guest's agent broke the rules"
                    )
                    return
                await self._turns.acquire()
                way = self._ways.get(name)
                if way is None:
                    # Its container is gone, and an agent that keeps the rules has closed the socket.
                    self._turns.release()
                    return
                try:
                    # A descriptor of its own: the connection may last a little longer than the container.
                    own = os.dup(way.fd)
                except OSError as err:  # there are none left
                    self._turns.release()
                    self._say_refused(source, err)
                    continue
                work = self._connection(way, own, source, reply.token)
                self._in_background(work, f"connection to {source}")
        except RpcError as err:
            if not isinstance(err, ConnectionClosed) and err.code is not Code.NOT_FOUND:
                log.warning("host_socket_closed", source=source, reason=str(err))
        finally:
            self._shut(name)

    async def _connection(self, way: _Way, fd: int, source: str, token: bytes) -> None:
        limit = asyncio.timeout_at(way.end)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
                async with limit:
                    way.connections.add(limit)
                    await self._join(server, fd, source, token)
        except (OSError, TimeoutError) as err:
            log.debug("connection_to_host_socket_broke", source=source, reason=str(err))
        finally:
            way.connections.discard(limit)
            os.close(fd)
            self._turns.release()

    async def _join(self, server: socket.socket, fd: int, source: str, token: bytes) -> None:
        try:
            await self._connect(server, fd)
        except OSError as err:
            self._say_refused(source, err)
            server.close()
        async with asyncio.timeout(_GUEST_LIMIT_S):
            program = await self._vsock.connect(SOCKETS_PORT)
        with program:
            # Without a server, the program's connection ends when this one does.
            await asyncio.get_running_loop().sock_sendall(program, token)
            if server.fileno() >= 0:
                await relay(program, server)

    async def _connect(self, server: socket.socket, fd: int) -> None:
        """Connect to the socket behind a descriptor; leaves `server` non-blocking. Raises OSError."""
        server.setblocking(False)
        try:
            server.connect(f"/proc/self/fd/{fd}")
        except BlockingIOError:
            # Its queue is full. The kernel tells nobody when it is not any more: only who waits in connect() learns it.
            async with self._waiting:
                server.setblocking(True)
                server.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _CONNECT_LIMIT_S, 0)
                )
                await asyncio.to_thread(server.connect, f"/proc/self/fd/{fd}")
                server.setblocking(False)

    def _say_refused(self, source: str, err: OSError) -> None:
        say = log.debug if source in self._refused else log.warning
        say("host_socket_refused", source=source, reason=err.strerror or str(err))
        self._refused.add(source)

    async def _close(self, name: str) -> None:
        try:
            await self._guest.agent.close_socket(CloseSocketRequest(name=name))
        except RpcError as err:
            log.debug("host_socket_not_closed", name=name, error=str(err))

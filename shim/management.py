"""The sandbox's own socket, for whoever looks after its volumes: HTTP, as Kata's shim has it, in a directory of root's.

    POST /direct-volume/stats?path=PATH                                  what is used of a volume, as JSON
    POST /direct-volume/resize   {"VolumePath": PATH, "Size": BYTES}     make its file system as large as that

PATH is what containers mount the volume from. A refusal has one line that says why. `kata-py direct-volume` asks here.
"""

from __future__ import annotations

import asyncio
import os
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import msgspec
import structlog

from agent_proto.gen import agent_pb2
from hypervisor.errors import HypervisorError
from shim import paths
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from shim.disks import Disks, Volume

log = structlog.get_logger()

STATS, RESIZE = "/direct-volume/stats", "/direct-volume/resize"
_HEAD_BYTES, _BODY_BYTES = 16 << 10, 64 << 10
_ASKING_LIMIT_S = 10.0
_SECTOR_BYTES = 512


class ResizeRequest(msgspec.Struct, frozen=True):
    """The names are Kata's."""

    VolumePath: str
    Size: int


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Management:
    """Answers for one guest that is up."""

    def __init__(self, agent: AgentClient, disks: Disks) -> None:
        self._agent = agent
        self._disks = disks

    async def serve(self, sandbox_id: str) -> None:
        """Answer until this is cancelled, which also ends what is being answered."""
        path = paths.management_socket(sandbox_id)
        async with asyncio.TaskGroup() as answers:

            def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                answers.create_task(self._answer(reader, writer))

            try:
                server = await asyncio.start_unix_server(begin, path, limit=_HEAD_BYTES)
            except OSError as err:
                log.warning("management_unavailable", socket=path, reason=str(err))
                return
            try:
                os.chmod(path, 0o600)
                await asyncio.get_running_loop().create_future()
            finally:
                # Not by serve_forever(): from Python 3.12 on it waits for all who are connected.
                server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            status, body = await self._answer_to(reader)
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            await writer.drain()
        except ConnectionError:
            pass  # nobody waits for the answer
        finally:
            writer.close()

    async def _answer_to(self, reader: asyncio.StreamReader) -> tuple[HTTPStatus, bytes]:
        try:
            async with asyncio.timeout(_ASKING_LIMIT_S):
                request = await _read(reader)
            return HTTPStatus.OK, await self._do(*request)
        except _Refused as err:
            return err.status, f"{err}\n".encode()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return HTTPStatus.BAD_REQUEST, b"this is no request\n"
        except Exception:
            log.exception("management_request_failed")  # it keeps nobody else from an answer
            return HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error; details are in the shim log\n"

    async def _do(self, method: str, target: str, body: bytes) -> bytes:
        try:
            address = urlsplit(target)
        except ValueError as err:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"not an address: {target[:80]!r}: {err}") from err
        if address.path not in (STATS, RESIZE):
            raise _Refused(
                HTTPStatus.NOT_FOUND, f"there is no {address.path}; there are {STATS} and {RESIZE}"
            )
        if method != "POST":
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{address.path} is asked by POST, not {method}")
        try:
            if address.path == STATS:
                return await self._stats(parse_qs(address.query).get("path", [""])[0])
            await self._resize(body)
            return b""
        except (HypervisorError, RpcError) as err:
            unknown = isinstance(err, RpcError) and err.code is Code.UNIMPLEMENTED
            why = (
                "the guest's agent cannot do that; use kata-py's own guest of this version"
                if unknown
                else str(err)
            )
            raise _Refused(HTTPStatus.CONFLICT, why) from err

    async def _stats(self, path: str) -> bytes:
        reply = await self._agent.get_volume_stats(
            agent_pb2.VolumeStatsRequest(volume_guest_path=self._volume(path).place)
        )
        usage = [
            {"available": one.available, "total": one.total, "used": one.used, "unit": one.unit}
            for one in reply.usage
        ]
        return msgspec.json.encode({"usage": usage})

    async def _resize(self, body: bytes) -> None:
        try:
            request = msgspec.json.decode(body, type=ResizeRequest)
        except msgspec.MsgspecError as err:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"no request to resize: {err}") from err
        volume = self._volume(request.VolumePath)
        if request.Size <= 0 or request.Size % _SECTOR_BYTES or request.Size >= 1 << 63:
            raise _Refused(
                HTTPStatus.BAD_REQUEST,
                f"volume {request.VolumePath}: a disk of {request.Size} bytes; a size is a multiple of {_SECTOR_BYTES}",
            )
        await self._disks.resize(volume, request.Size)
        await self._agent.resize_volume(
            agent_pb2.ResizeVolumeRequest(volume_guest_path=volume.place, size=request.Size)
        )
        log.info("volume_resized", volume=request.VolumePath, bytes=request.Size)

    def _volume(self, path: str) -> Volume:
        volume = self._disks.volume(path)
        if volume is None:
            raise _Refused(HTTPStatus.NOT_FOUND, f"no container here has a direct volume {path}")
        return volume


async def _read(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Method, address and body of a request. Raises what tells that it is none."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = head[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"not a request of HTTP/1.1: {head[0][:80]!r}")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
    }
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > len(str(_BODY_BYTES)) or int(length) > _BODY_BYTES:
        raise _Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of {length[:20]} bytes; {_BODY_BYTES} are the most"
        )
    return words[0], words[1], await reader.readexactly(int(length))

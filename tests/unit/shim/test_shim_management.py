"""The sandbox's own socket: what is answered about volumes, and what is refused in one line."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest

from agent_proto.gen import agent_pb2, csi_pb2
from hypervisor.errors import HotplugRefused
from shim import paths
from shim.disks import Volume
from shim.management import Management
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Sandbox:
    """The agent and the disks of a guest with one volume."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.fails: Exception | None = None

    def volume(self, path: str) -> Volume | None:
        return Volume("disk1", "/guest/place") if path == "/csi/v 1" else None

    async def resize(self, volume: Volume, size_bytes: int) -> None:
        self.done.append(("disk", volume.disk, size_bytes))

    async def resize_volume(self, request: agent_pb2.ResizeVolumeRequest) -> None:
        if self.fails is not None:
            raise self.fails
        self.done.append(("file system", request.volume_guest_path, request.size))

    async def get_volume_stats(self, request: agent_pb2.VolumeStatsRequest) -> csi_pb2.VolumeStatsResponse:
        assert request.volume_guest_path == "/guest/place"
        answer = csi_pb2.VolumeStatsResponse()
        answer.usage.add(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)
        return answer


@pytest.fixture
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture
async def serving(
    sandbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Task[None]]:
    monkeypatch.setattr(paths, "RUN_ROOT", str(tmp_path))
    (tmp_path / "s").mkdir()
    serving = asyncio.create_task(Management(sandbox, sandbox).serve("s"))
    while not (tmp_path / "s" / "shim-monitor.sock").exists():
        await asyncio.sleep(0)
    yield serving
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
def socket(serving: asyncio.Task[None]) -> str:
    return paths.management_socket("s")


async def ask(socket: str, words: bytes) -> tuple[int, str]:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(words)
    writer.write_eof()
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    return int(head.split()[1]), body


def post(target: str, body: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (target.encode(), len(body), body)


def resized(size: object, path: str = "/csi/v 1") -> bytes:
    return post("/direct-volume/resize", json.dumps({"VolumePath": path, "Size": size}).encode())


async def test_what_is_used(socket: str) -> None:
    status, body = await ask(socket, post("/direct-volume/stats?path=/csi/v%201"))
    assert (status, json.loads(body)) == (
        200,
        {"usage": [{"available": 1, "total": 3, "used": 2, "unit": 1}]},
    )


async def test_the_disk_comes_before_what_is_on_it(socket: str, sandbox: Sandbox) -> None:
    assert await ask(socket, resized(1 << 30)) == (200, "")
    assert sandbox.done == [("disk", "disk1", 1 << 30), ("file system", "/guest/place", 1 << 30)]


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        (post("/direct-volume/stats?path=/other"), 404, "no container here has a direct volume /other"),
        (post("/direct-volume/stats"), 404, "no container here has a direct volume "),
        (resized(512, "/other"), 404, "no container here has a direct volume /other"),
        (resized(511), 400, "volume /csi/v 1: a disk of 511 bytes; a size is a multiple of 512"),
        (resized(0), 400, "a disk of 0 bytes"),
        (resized(-512), 400, "a disk of -512 bytes"),
        (resized(1 << 63), 400, "a disk of 9223372036854775808 bytes"),
        (resized("1G"), 400, "no request to resize: Expected `int`, got `str`"),
        (post("/direct-volume/resize", b"{"), 400, "no request to resize"),
        (post("/metrics"), 404, "there is no /metrics; there are /direct-volume/stats and"),
        (b"GET /direct-volume/stats HTTP/1.1\r\n\r\n", 405, "is asked by POST, not GET"),
        (post("//["), 400, "not an address: '//[': Invalid IPv6 URL"),
        (b"hello\r\n\r\n", 400, "not a request of HTTP/1.1: 'hello'"),
        (b"hello", 400, "this is no request"),
        (b"x" * 100_000, 400, "this is no request"),
        (b"POST / HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", 413, "a body of 999999999 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 413, "a body of -1 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nx", 400, "this is no request"),
    ],
)
async def test_refusals(socket: str, sandbox: Sandbox, request_: bytes, status: int, text: str) -> None:
    got, body = await ask(socket, request_)
    assert (got, body.count("\n")) == (status, 1)
    assert text in body
    assert sandbox.done == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RpcError(Code.UNIMPLEMENTED, "no"), "the guest's agent cannot do that; use kata-py's own guest"),
        (RpcError(Code.INVALID_ARGUMENT, "it only grows"), "it only grows"),
        (HotplugRefused("cannot make it so"), "cannot make it so"),
    ],
)
async def test_what_the_guest_refuses(socket: str, sandbox: Sandbox, error: Exception, text: str) -> None:
    sandbox.fails = error
    status, body = await ask(socket, resized(512))
    assert status == 409
    assert text in body


async def test_a_defect_is_answered_and_meets_nobody_else(socket: str, sandbox: Sandbox) -> None:
    sandbox.fails = ZeroDivisionError("a defect")
    assert await ask(socket, resized(512)) == (500, "internal error; details are in the shim log\n")
    sandbox.fails = None
    assert await ask(socket, resized(512)) == (200, "")


async def test_who_is_connected_does_not_hold_up_the_end(socket: str, serving: asyncio.Task[None]) -> None:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(b"POST ")
    assert await ask(socket, post("/other")) == (404, ANY)  # the other one is known by then
    serving.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(serving, return_exceptions=True)
        assert await reader.read() == b""
    writer.close()

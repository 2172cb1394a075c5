"""The kernel's transport, with Unix sockets in the place of AF_VSOCK ones: the logic around them is ours."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HostUnsupported
from hypervisor.vsock import vhost
from hypervisor.vsock.vhost import VhostVsock, open_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GUEST_CID = 77
STRANGER_CID = 78


def refuse_first(times: int, number: int = errno.EADDRINUSE) -> Callable[[int, int], None]:
    calls = []

    def set_cid(fd: int, cid: int) -> None:
        calls.append(cid)
        assert 3 <= cid <= 2**32 - 2
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))

    return set_cid


@pytest.mark.parametrize("taken", [0, 1, 49])
def test_an_address_nobody_has(tmp_path: Path, taken: int) -> None:
    (tmp_path / "vhost-vsock").touch()
    fd, cid = open_device(refuse_first(taken), device=str(tmp_path / "vhost-vsock"))
    os.close(fd)
    assert 3 <= cid <= 2**32 - 2


@pytest.mark.parametrize(
    ("set_cid", "message"),
    [
        (refuse_first(50), "no free guest address in 50 attempts"),
        (refuse_first(1, errno.EINVAL), "Invalid argument"),
    ],
)
def test_no_address(tmp_path: Path, set_cid: Callable[[int, int], None], message: str) -> None:
    (tmp_path / "vhost-vsock").touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostUnsupported, match=message):
        open_device(set_cid, device=str(tmp_path / "vhost-vsock"))
    assert os.listdir("/proc/self/fd") == before


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(
        HostUnsupported, match="No such file or directory; load the kernel module vhost_vsock"
    ):
        open_device(refuse_first(0), device=str(tmp_path / "nothing"))


class FakeVsock(socket.socket):
    """An AF_UNIX socket that takes (cid, port) addresses; `accepts_from` is who seems to connect."""

    accepts_from = GUEST_CID
    connect_error: OSError | None = None

    def _name(self, address: Any) -> str:
        return f"\0kata-py-test-{os.getpid()}-{address[1]}"

    def bind(self, address: Any) -> None:
        super().bind(self._name(address))

    def connect(self, address: Any) -> None:
        if self.connect_error is not None:
            raise self.connect_error
        assert address[0] == GUEST_CID
        super().connect(self._name(address))

    def accept(self) -> tuple[socket.socket, Any]:
        sock, _ = super().accept()
        return sock, (self.accepts_from, 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeVsock]:
    class Fake(FakeVsock):
        pass

    def stream() -> socket.socket:
        sock = Fake(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    monkeypatch.setattr(vhost, "_stream", stream)
    return Fake


def test_a_real_socket_may_take_long_to_connect() -> None:
    try:
        sock = vhost._stream()
    except OSError as err:
        assert err.errno == errno.EAFNOSUPPORT
        pytest.skip("this kernel has no AF_VSOCK")
    with sock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(sock.fileno())) as same:
        said = same.getsockopt(socket.AF_VSOCK, vhost._SO_VM_SOCKETS_CONNECT_TIMEOUT, struct.calcsize("@ll"))
    assert struct.unpack("@ll", said) == (24 * 60 * 60, 0)


async def test_the_guest_is_heard(fake: type[FakeVsock]) -> None:
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    vsock = VhostVsock(GUEST_CID)
    vsock.listen(1030, accepted.put_nowait)
    with await vsock.connect(1030) as ours, await accepted.get() as theirs:
        assert not ours.getblocking()
        assert not theirs.getblocking()
        theirs.send(b"hello")
        assert await asyncio.get_running_loop().sock_recv(ours, 10) == b"hello"
    await vsock.aclose()


async def test_strangers_are_turned_away(fake: type[FakeVsock]) -> None:
    fake.accepts_from = STRANGER_CID
    vsock = VhostVsock(GUEST_CID)
    vsock.listen(1030, lambda sock: pytest.fail("passed on"))
    with await vsock.connect(1030) as stranger:
        assert await asyncio.get_running_loop().sock_recv(stranger, 10) == b""
    await vsock.aclose()


async def test_a_port_is_taken_once(fake: type[FakeVsock]) -> None:
    first, second = VhostVsock(GUEST_CID), VhostVsock(GUEST_CID)
    first.listen(1030, socket.socket.close)
    with pytest.raises(OSError, match="Address already in use"):
        second.listen(1030, socket.socket.close)
    await first.aclose()
    second.listen(1030, socket.socket.close)
    await second.aclose()
    await second.aclose()


async def test_nobody_listens_in_the_guest(fake: type[FakeVsock]) -> None:
    fake.connect_error = ConnectionResetError(errno.ECONNRESET, "reset")
    vsock = VhostVsock(GUEST_CID)
    with pytest.raises(ConnectionRefusedError, match="nobody listens on vsock port 1024 of the guest"):
        await vsock.connect(1024)
    await vsock.aclose()


async def test_other_errors_pass(fake: type[FakeVsock]) -> None:
    fake.connect_error = OSError(errno.ENODEV, "No such device")
    vsock = VhostVsock(GUEST_CID)
    with pytest.raises(OSError, match="No such device"):
        await vsock.connect(1024)
    await vsock.aclose()


async def test_closing_fails_a_connect_that_waits_for_the_driver(fake: type[FakeVsock]) -> None:
    vsock = VhostVsock(GUEST_CID)
    with pytest.MonkeyPatch.context() as patch:  # AF_VSOCK connects in the background, AF_UNIX does not
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def pending(sock: socket.socket, address: object) -> None:
            await never

        patch.setattr(asyncio.get_running_loop(), "sock_connect", pending)
        connecting = asyncio.create_task(vsock.connect(1024))
        await asyncio.sleep(0.01)
        assert not connecting.done()
        await vsock.aclose()
        with pytest.raises(ConnectionResetError, match="the machine is gone"):
            await connecting
        with pytest.raises(ConnectionResetError, match="the machine is gone"):
            await vsock.connect(1024)

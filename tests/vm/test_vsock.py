"""The user-space vsock device under a real QEMU, with a real driver and our agent on the other side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from agent_proto.gen import health_pb2
from agent_proto.services import CHECK
from hypervisor.arch import arch_named
from hypervisor.vsock.user import UserVsock
from tests.vm.guest import FOREIGN, OWN, Software
from ttrpc import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

AGENT_PORT = 1024
READY_PORT = 1100
NOBODY_PORT = 4321

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(120),  # a boot without KVM, on a machine that has other things to do
    pytest.mark.skipif(not OWN.qemu.exists(), reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not (OWN.guest / "initrd.img").exists(), reason="no guest image: run `make guest`"),
]


class Vm:
    """QEMU with our device; `ready` is resolved with what the guest's agent says once it listens."""

    def __init__(self, software: Software) -> None:
        self._software = software
        ours, self._vmm_end = socket.socketpair()
        monitor, self._monitor_end = socket.socketpair()
        self.device = UserVsock(ours)
        self.ready: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self.device.listen(READY_PORT, self._on_ready)
        self._monitor = monitor
        self._reports: set[asyncio.Task[None]] = set()

    async def boot(self, console: Path) -> None:
        with console.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._argv(),
                pass_fds=[self._vmm_end.fileno(), self._monitor_end.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._vmm_end.close()
        self._monitor_end.close()
        self._lines, self._writer = await asyncio.open_connection(sock=self._monitor)
        await self._lines.readline()
        await self.monitor("qmp_capabilities")

    def _argv(self) -> list[str]:
        software, arch = self._software, arch_named(self._software.arch)
        words = f"{' '.join(arch.kernel_words)} quiet panic=-1 tsc=reliable no_timer_check"
        cpu = arch.cpu["tcg"]
        device = ("-device", f"{arch.devices.console},chardev=console")
        serial = ("-serial", "chardev:console") if arch.devices.console is None else device
        return [
            *(str(software.qemu), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-chardev", "stdio,id=console", *serial),
            *("-machine", f"{arch.machine},memory-backend=mem", "-accel", "tcg,tb-size=256"),
            *("-cpu", ",".join(filter(None, (cpu.model, cpu.features)))),
            *("-m", "256", "-object", "memory-backend-memfd,id=mem,size=256M,share=on"),
            *("-kernel", str(software.guest / "vmlinux"), "-initrd", str(software.guest / "initrd.img")),
            *("-append", f"{words} kata_py.ready_vport={READY_PORT}"),
            *("-chardev", f"socket,id=vsock,fd={self._vmm_end.fileno()}"),
            *("-device", "vhost-user-vsock-pci,chardev=vsock"),
            *("-chardev", f"socket,id=monitor,fd={self._monitor_end.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]

    async def monitor(self, command: str) -> None:
        self._writer.write(json.dumps({"execute": command}).encode())
        while "return" not in json.loads(await self._lines.readline()):
            pass

    async def health(self) -> health_pb2.HealthCheckResponse:
        client = Client.from_socket(await self.device.connect(AGENT_PORT))
        try:
            return await client.call("grpc.Health", CHECK, health_pb2.CheckRequest(), timeout_s=30)
        finally:
            await client.aclose()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def close(self) -> None:
        await self.kill()
        self._writer.close()
        await self.device.aclose()
        await asyncio.gather(*self._reports)

    def _on_ready(self, sock: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._read_ready(sock))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _read_ready(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        line = await reader.readline()
        writer.close()
        if line and not self.ready.done():
            self.ready.set_result(json.loads(line))


@pytest.fixture
def software() -> Software:
    return OWN


@pytest.fixture
async def vm(tmp_path: Path, software: Software) -> AsyncIterator[Vm]:
    console = tmp_path / "console.log"
    vm = Vm(software)
    await vm.boot(console)
    try:
        yield vm
    finally:
        await vm.close()
        sys.stdout.write(console.read_text(errors="replace"))  # pytest shows it when the test failed


def on(*software: Software) -> pytest.MarkDecorator:
    """Run the test with these."""
    return pytest.mark.parametrize("software", software, ids=lambda each: each.arch)


@on(OWN, *FOREIGN)
async def test_agent_is_reached_and_refuses_properly(vm: Vm) -> None:
    """Two connects that are issued before the guest has a driver, and then ordinary use."""
    early = [asyncio.create_task(vm.device.connect(port)) for port in (AGENT_PORT, NOBODY_PORT)]
    said = await vm.ready
    assert 0 < said["init_s"] < said["ready_s"]
    assert vm.device.driver_up
    for task in early:  # the driver was there before the listener: both are answered, neither hangs
        with contextlib.suppress(ConnectionRefusedError):
            (await task).close()
    assert (await vm.health()).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(ConnectionRefusedError, match=f"vsock port {NOBODY_PORT}"):
        await vm.device.connect(NOBODY_PORT)


async def test_two_hundred_connections(vm: Vm) -> None:
    await vm.ready
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        # A call each: without one, the agent's queue of connections to accept would overflow, rightly.
        assert (await vm.health()).status == health_pb2.HealthCheckResponse.SERVING
    assert vm.device.stats.flows < 10, "closed streams do not pile up"
    assert len(os.listdir("/proc/self/fd")) < fds + 10


async def test_stream_survives_a_pause(vm: Vm) -> None:
    await vm.ready
    client = Client.from_socket(await vm.device.connect(AGENT_PORT))
    await vm.monitor("stop")
    assert not vm.device.driver_up
    asked = asyncio.create_task(client.call("grpc.Health", CHECK, health_pb2.CheckRequest(), timeout_s=60))
    connecting = asyncio.create_task(vm.device.connect(AGENT_PORT))
    done, _ = await asyncio.wait([asked, connecting], timeout=0.3)
    assert not done, "nothing answers in a paused guest"
    await vm.monitor("cont")
    assert (await asked).status == health_pb2.HealthCheckResponse.SERVING
    (await connecting).close()
    await client.aclose()


# Not on s390x: with QEMU 7.2 the guest that boots after a reset does not come back on its zPCI function, and our
# machines end where others reset.
@on(OWN, FOREIGN[0])
async def test_guest_reset_ends_streams_and_the_new_guest_is_served(vm: Vm) -> None:
    await vm.ready
    sock = await vm.device.connect(AGENT_PORT)
    vm.ready = asyncio.get_running_loop().create_future()
    await vm.monitor("system_reset")
    await vm.ready
    assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    sock.close()
    assert (await vm.health()).status == health_pb2.HealthCheckResponse.SERVING


async def test_killed_qemu_ends_streams_and_connects(vm: Vm) -> None:
    await vm.ready
    sock = await vm.device.connect(AGENT_PORT)
    await vm.kill()
    assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    assert "the front end closed" in str(await vm.device.broken)
    with pytest.raises(ConnectionResetError):
        await vm.device.connect(AGENT_PORT)
    sock.close()

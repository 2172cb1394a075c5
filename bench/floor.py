"""The floor of a start: QEMU with the product's kernel, machine and devices, until a guest that does nothing answers.

Nothing that boots this kernel on this machine can answer earlier, so the ratio to it is what kata-py adds.
The guest's program is `floor_init.c`, in a second archive behind the product's initrd, whose files stay.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import struct
import subprocess
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bench.errors import BenchError
from config import load
from guest_agent.modules import BOOT, LIST
from guest_image.cpio import Tree
from hypervisor.console import Console
from hypervisor.process import spawned
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.sockets import listener_and_connection, unix_listener
from hypervisor.virtiofsd import shared_dir
from hypervisor.vsock.base import FIRST_GUEST_CID
from hypervisor.vsock.user import UserVsock
from hypervisor.vsock.vhost import VhostVsock, open_device
from shim.network import NIC_PORTS
from shim.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypervisor.process import Process
    from hypervisor.spec import VmSpec
    from hypervisor.vsock.base import Vsock

T = TypeVar("T")
SOURCE = Path(__file__).with_name("floor_init.c")
PORT = 1024
LIMIT_S = 120.0
_COMPILE = (
    *("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-ffreestanding"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none"),
)
# A newc header is a magic and 13 numbers of 8 hexadecimal digits each; the contents' size is the seventh, the
# name's the twelfth. Name and contents are padded to 4 bytes.
_MAGIC, _HEADER_BYTES, _SIZE, _NAME_SIZE = b"070701", 110, 6, 11
# Two times of the guest's clock as seconds and nanoseconds: started, answered.
_TIMES = struct.Struct("<4q")


def vm_spec(config: Path, folder: Path) -> VmSpec:
    """The machine that the shim makes with this configuration, but with the floor's program as its init.

    `folder` gets the initrd and is where the machine runs. Raises BenchError, ConfigError, HypervisorError.
    """
    exported = folder / "shared"
    exported.mkdir(parents=True)
    spec = plan(load(config).config, "floor", exported=exported)
    if spec.initrd is None:
        raise BenchError("the floor needs a configuration with an initrd")
    archive = spec.initrd.read_bytes()
    initrd = folder / "initrd.img"
    initrd.write_bytes(archive + _floor_archive(archive, folder / "floor"))
    words = f"{spec.kernel_params} rdinit=/floor".strip()
    return dataclasses.replace(
        spec, run_dir=folder / "run", initrd=initrd, kernel_params=words, nic_ports=NIC_PORTS
    )


class Floor(NamedTuple):
    """Seconds from before QEMU's fork: until the guest's answer, and until its init began to run."""

    answered: float
    init: float


async def once(spec: VmSpec) -> Floor:
    """Boots the machine and ends it. Raises BenchError."""
    spec.run_dir.mkdir(mode=0o700)
    try:
        async with AsyncExitStack() as undo, asyncio.timeout(LIMIT_S):
            return await _until_answer(spec, undo)
    except TimeoutError as err:
        raise BenchError(f"the floor's guest did not answer within {LIMIT_S:.0f} s") from err
    finally:
        shutil.rmtree(spec.run_dir)


async def _until_answer(spec: VmSpec, undo: AsyncExitStack) -> Floor:
    machine = await start(spec, undo)
    answered, guest_s = await _answer(machine)
    return Floor(answered - machine.started, answered - machine.started - guest_s)


class Machine(NamedTuple):
    """A QEMU of the bench's own; `started` is the monotonic clock's time before its fork."""

    qemu: Process
    console: Console
    vsock: Vsock
    started: float


async def start(spec: VmSpec, undo: AsyncExitStack, more: Sequence[str] = ()) -> Machine:
    """Starts QEMU with what `spec` says and the words `more`; `undo` ends it. Raises HypervisorError."""
    with ExitStack() as handed_over:
        ours, guest_console = socket.socketpair()
        handed_over.enter_context(guest_console)
        console = Console(ours, spec.run_dir / "console.log")
        undo.callback(console.close)
        shares = []
        for index, share in enumerate(spec.shares):
            listener, connection = listener_and_connection(spec.run_dir / f"fs{index}.sock")
            shares.append(handed_over.enter_context(connection).fileno())
            await undo.enter_async_context(shared_dir(share, listener))
        # Part of the machine although nobody asks it anything here.
        monitor = handed_over.enter_context(unix_listener(spec.run_dir / "qmp.sock"))
        vsock, guest_cid, vsock_fd = _vsock(spec, handed_over)
        undo.push_async_callback(vsock.aclose)
        fds = Fds(
            qmp=monitor.fileno(),
            console=guest_console.fileno(),
            vsock=vsock_fd,
            guest_cid=guest_cid,
            shares=tuple(shares),
        )
        argv = [*build_cmdline(spec, fds), *more]
        started = time.monotonic()
        qemu = await undo.enter_async_context(spawned(argv, fds=fds.all(), netns=spec.netns))
    return Machine(qemu, console, vsock, started)


def _vsock(spec: VmSpec, handed_over: ExitStack) -> tuple[Vsock, int | None, int]:
    """Our side of the device, the guest's address if QEMU has to know it, and QEMU's descriptor."""
    if spec.vsock == "vhost":
        fd, guest_cid = open_device()
        handed_over.callback(os.close, fd)
        return VhostVsock(guest_cid), guest_cid, fd
    ours, qemus = socket.socketpair()
    handed_over.enter_context(qemus)
    return UserVsock(ours, guest_cid=FIRST_GUEST_CID), None, qemus.fileno()


async def _answer(machine: Machine) -> tuple[float, float]:
    """When the answer came, in monotonic seconds, and how long the guest's program had run by then."""
    return await unless_ended(machine, asyncio.create_task(_ask(machine.vsock)))


async def unless_ended(machine: Machine, answer: asyncio.Task[T]) -> T:
    """What `answer` gives. Raises BenchError when QEMU ends before, and what the task raises."""
    qemu, console = machine.qemu, machine.console
    try:
        ends: set[asyncio.Future[Any]] = {answer, qemu.exited}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        console.drain()
        last = (qemu.output_tail() or console.tail() or ["nothing on the console"])[-1]
        raise BenchError(f"the bench's own QEMU ended with {qemu.exited.result()}: {last}")
    finally:
        answer.cancel()
        await asyncio.wait([answer])


async def _ask(vsock: Vsock) -> tuple[float, float]:
    # The guest listens before its driver is up: one attempt is enough.
    with await vsock.connect(PORT) as stream:
        told = await asyncio.get_running_loop().sock_recv(stream, _TIMES.size)
        at = time.monotonic()
    if len(told) != _TIMES.size:
        raise BenchError(f"the floor's guest said {told!r}")
    started_s, started_ns, answered_s, answered_ns = _TIMES.unpack(told)
    return at, answered_s - started_s + (answered_ns - started_ns) / 1e9


def _floor_archive(initrd: bytes, program: Path) -> bytes:
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BenchError("the floor's guest program needs a C compiler: apt-get install gcc")
    subprocess.run([compiler, *_COMPILE, f"-DFLOOR_PORT={PORT}", "-o", program, SOURCE], check=True)
    tree = Tree()
    tree.file("/floor", program.read_bytes(), mode=0o755)
    tree.file("/floor.modules", b"".join(path.encode() + b"\0" for path in modules(initrd, BOOT)))
    return tree.to_cpio()


def modules(initrd: bytes, names: Sequence[str]) -> list[str]:
    """Paths of the modules `names` and of what they need, in the order of loading.

    Raises BenchError when the archive cannot be read or its kernel has them built in.
    """
    known = {}
    for line in _file_in(initrd, LIST.lstrip("/")).decode().splitlines():
        name, path, *needed = line.split()
        known[name] = (path, needed)
    order: dict[str, None] = {}

    def add(name: str) -> None:
        if name in known and known[name][0] not in order:
            path, needed = known[name]
            for other in needed:
                add(other)
            order[path] = None

    for name in names:
        add(name)
    if not order:
        raise BenchError(f"the guest's kernel has {', '.join(names)} built in; the bench expects modules")
    return list(order)


def _file_in(archive: bytes, path: str) -> bytes:
    for name, contents in _entries(archive):
        if name == path:
            return contents
    raise BenchError(f"there is no {path} in the guest's initrd")


def _entries(archive: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while archive[at : at + len(_MAGIC)] == _MAGIC:
        digits = archive[at + len(_MAGIC) : at + _HEADER_BYTES]
        numbers = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
        name_at = at + _HEADER_BYTES
        data_at = _aligned(name_at + numbers[_NAME_SIZE])
        name = archive[name_at : name_at + numbers[_NAME_SIZE] - 1].decode()
        yield name, archive[data_at : data_at + numbers[_SIZE]]
        at = _aligned(data_at + numbers[_SIZE])
    if at == 0:
        raise BenchError("the guest's initrd is compressed; the floor needs to read it: build the guest anew")


def _aligned(offset: int) -> int:
    return offset + -offset % 4

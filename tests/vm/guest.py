"""A booted guest with a client of its agent, and specifications of containers to run in it.

Containers get a root file system with a static busybox that is appended to the initrd, so neither a shared file system
nor an image is needed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.client import AgentClient
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from guest_image.cpio import Tree
from guest_image.elf import Elf
from hypervisor.accel import choose_accel
from hypervisor.qemu.machine import booted
from hypervisor.spec import Export, Share, VmSpec
from ttrpc import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Mapping

    from hypervisor.qemu.machine import Machine

QEMU = Path(shutil.which("qemu-system-x86_64") or "/nonexistent")
VIRTIOFSD = next(
    (Path(p) for p in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd") if Path(p).exists()),
    Path("/nonexistent"),
)
BUSYBOX = Path(shutil.which("busybox") or "/nonexistent")
#: Another image than the tree's own, for example one made from another Debian suite.
GUEST = Path(os.environ.get("KATA_PY_TEST_GUEST") or Path(__file__).parents[2] / "build" / "guest")
ROOTFS = "/test/rootfs"
APPLETS = (
    "cat", "chmod", "chown", "date", "dd", "df", "hostname", "id", "ls", "mkdir", "mknod", "mount", "ps", "readlink",
    "sh", "sleep", "stat", "stty", "tail", "test", "touch", "true",
)  # fmt: skip
READY_VPORT, LOG_VPORT, AGENT_VPORT = 1030, 1025, 1024
#: Emulated, on a busy machine, everything takes its time; nothing here waits as long unless it fails.
PATIENCE_S = 60


@dataclass(frozen=True)
class Software:
    """What a machine of one architecture runs: a guest, and the busybox of its containers."""

    arch: str
    guest: Path
    busybox: Path

    @property
    def qemu(self) -> Path:
        return Path(shutil.which(f"qemu-system-{self.arch}") or "/nonexistent")


OWN = Software("x86_64", GUEST, BUSYBOX)
_FOREIGN = Path(__file__).parents[2] / "build" / "foreign"
#: Emulated everywhere, so nothing excuses a machine from running them.
FOREIGN = (
    Software("aarch64", _FOREIGN / "arm64", _FOREIGN / "arm64" / "busybox"),
    Software("s390x", _FOREIGN / "s390x", _FOREIGN / "s390x" / "busybox"),
)
#: For the parameters of a fixture.
ALL = [pytest.param(software, id=software.arch) for software in (OWN, *FOREIGN)]

#: For `pytestmark` of a file whose tests boot the guest.
MARKS = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(not QEMU.exists(), reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not (GUEST / "manifest.json").exists(), reason="no guest image: run make guest"),
    pytest.mark.skipif(
        not BUSYBOX.exists() or Elf(BUSYBOX.read_bytes(), "busybox").interpreter() is not None,
        reason="no static busybox for the containers",
    ),
]


def initrd_with_rootfs(target: Path, software: Software) -> Path:
    """The kernel unpacks archives that follow each other into the same tree."""
    tree = Tree()
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        tree.directory(f"{ROOTFS}/{name}")
    tree.file(f"{ROOTFS}/bin/busybox", software.busybox.read_bytes(), 0o755)
    for name in APPLETS:
        tree.symlink(f"{ROOTFS}/bin/{name}", "busybox")
    target.write_bytes((software.guest / "initrd.img").read_bytes() + tree.to_cpio())
    return target


class Guest:
    """The booted machine with a client of its agent."""

    def __init__(self, machine: Machine, client: Client, ready: dict[str, float]) -> None:
        self.machine = machine
        self.agent = AgentClient(client, timeout_s=PATIENCE_S, create_container_timeout_s=PATIENCE_S)
        self.ready = ready
        self._count = 0

    def new_id(self) -> str:
        self._count += 1
        return f"c{self._count}"

    async def create(self, *args: str, change: Callable[[oci_pb2.Spec], None] | None = None) -> str:
        """A created container that would run the arguments; the others' defaults are containerd's."""
        container_id = self.new_id()
        request = pb.CreateContainerRequest(container_id=container_id, OCI=specification(args))
        if change is not None:
            change(request.OCI)
        await self.agent.create_container(request)
        return container_id

    async def run(self, *args: str, change: Callable[[oci_pb2.Spec], None] | None = None) -> str:
        container_id = await self.create(*args, change=change)
        await self.agent.start_container(pb.StartContainerRequest(container_id=container_id))
        return container_id

    async def output(self, container_id: str, exec_id: str = "", *, stderr: bool = False) -> bytes:
        """Everything until the end of the stream."""
        call = self.agent.read_stderr if stderr else self.agent.read_stdout
        data = b""
        while True:
            request = pb.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=32768)
            piece = (await call(request)).data
            if not piece:
                return data
            data += piece

    async def wait(self, container_id: str, exec_id: str = "") -> int:
        async with asyncio.timeout(PATIENCE_S):
            request = pb.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
            return (await self.agent.wait_process(request)).status

    async def kill(self, container_id: str, number: int, exec_id: str = "") -> None:
        await self.agent.signal_process(
            pb.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=number)
        )

    async def remove(self, container_id: str) -> None:
        await self.agent.remove_container(pb.RemoveContainerRequest(container_id=container_id))

    async def result(
        self, *args: str, change: Callable[[oci_pb2.Spec], None] | None = None
    ) -> tuple[int, bytes]:
        """Run to the end: exit code and stdout."""
        container_id = await self.run(*args, change=change)
        text = await self.output(container_id)
        code = await self.wait(container_id)
        await self.remove(container_id)
        return code, text


def process(args: tuple[str, ...]) -> oci_pb2.Process:
    capabilities = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
    ]
    return oci_pb2.Process(
        User=oci_pb2.User(),
        Args=args,
        Env=["PATH=/bin", "TERM=xterm"],
        Cwd="/",
        NoNewPrivileges=True,
        Capabilities=oci_pb2.LinuxCapabilities(
            Bounding=capabilities, Effective=capabilities, Permitted=capabilities
        ),
        Rlimits=[oci_pb2.POSIXRlimit(Type="RLIMIT_NOFILE", Hard=1024, Soft=1024)],
    )


def specification(args: tuple[str, ...]) -> oci_pb2.Spec:
    mounts = (
        ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    )
    return oci_pb2.Spec(
        Version="1.0.2",
        Process=process(args),
        Root=oci_pb2.Root(Path=ROOTFS),
        Mounts=[
            oci_pb2.Mount(destination=destination, type=kind, source=source, options=options)
            for destination, kind, source, options in mounts
        ],
        Linux=oci_pb2.Linux(
            Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("ipc", "uts", "mount")],
            MaskedPaths=["/proc/kcore", "/proc/keys"],
            ReadonlyPaths=["/proc/sys"],
            CgroupsPath="/default/whatever",
        ),
    )


@asynccontextmanager
async def running_guest(
    directory: Path,
    params: str = "",
    shares: tuple[Share, ...] = (),
    exports: tuple[Export, ...] = (),
    software: Software = OWN,
    changed: Mapping[str, Any] | None = None,
    **root: Any,
) -> AsyncIterator[Guest]:
    """`root` replaces kernel and initrd; `changed` are further fields of the specification."""
    fields: dict[str, Any] = root or {
        "kernel": software.guest / "vmlinux",
        "initrd": initrd_with_rootfs(directory / "initrd.img", software),
    }
    spec = VmSpec(
        name="guest-test",
        run_dir=directory / "run",
        qemu_path=software.qemu,
        arch=software.arch,
        kernel_params=params,
        ready_vport=READY_VPORT,
        log_vport=LOG_VPORT,
        memory_mib=256,
        shares=shares,
        exports=exports,
        accel=choose_accel("auto", guest_arch=software.arch).value,
        **fields,
    )
    spec = replace(spec, **(changed or {}))
    loop = asyncio.get_running_loop()
    connected: asyncio.Queue[socket.socket] = asyncio.Queue()
    async with booted(spec, listeners={READY_VPORT: connected.put_nowait}) as machine:
        waiting = asyncio.ensure_future(connected.get())
        either: list[asyncio.Future[Any]] = [waiting, machine.exited]
        await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            raise machine.failure("the guest did not come up")
        async with asyncio.timeout(PATIENCE_S):
            with waiting.result() as connection:
                ready = json.loads(await loop.sock_recv(connection, 4096))
            client = Client.from_socket(await machine.vsock.connect(AGENT_VPORT))
        try:
            yield Guest(machine, client, ready)
        finally:
            await client.aclose()


async def execute(guest: Guest, container_id: str, exec_id: str, *args: str, terminal: bool = False) -> None:
    request = pb.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process(args))
    request.process.Terminal = terminal
    await guest.agent.exec_process(request)

"""What crun takes, which is brought into a guest, for an exec of `true`, and for a container of `true` from its
creation to its removal; beside it the same through that guest's agent, asked for by the host. The exec also through all
there is: `ctr`, containerd, a shim, and the agent of another guest.

The agent's has more to do, its calls over vsock, the streams and the wait for the exit, and starts no program for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent_proto.client import AgentClient
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from bench.errors import BenchError
from bench.lab import KATA_PY, LIMIT_S, timed
from bench.rows import Row
from config import load
from guest_image.apt import Apt
from guest_image.build import cache_dir
from guest_image.contents import Contents
from guest_image.cpio import Tree
from guest_image.errors import ImageError
from guest_image.tools import host_arch
from hypervisor.qemu.machine import booted
from shim.plan import plan
from ttrpc import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from bench.lab import Lab
    from hypervisor.spec import VmSpec

EXECS_PER_RUN = 3
GUEST_PROGRAM = Path(__file__).parent / "guest_crun.py"
CRUN_PORT, CRUN_EXEC, CRUN_WHOLE = 1032, b"e", b"w"  # as in the program
AGENT_PORT = 1024
_ROOTFS = "/bench/rootfs"
_CONTAINER = "bench"
_INTERPRETER = re.compile(rb"#!/usr/bin/python3\.\d+ -IS\n")


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """All of them in turn; the first of each does not count."""
    spec = _vm_spec(lab.config, lab.folder / "guest-exec", step)
    step("starting a container")
    with lab.idle_container(KATA_PY) as container:
        argv = partial(lab.exec_argv, container, "true")
        try:
            found = asyncio.run(_execs(spec, runs * EXECS_PER_RUN, argv, step))
        except TimeoutError as err:
            raise BenchError(f"the guest did not answer within {LIMIT_S:.0f} s") from err
    to = "crun in the guest"
    container = "container of true, created, run, removed"
    return [
        Row(name="exec true by ctr", unit="ms", values=found.by_ctr, to=to, base=found.crun),
        Row(
            name="exec true through the agent",
            unit="ms",
            values=found.agent,
            to=to,
            base=found.crun,
            aim_ratio=0.2,
        ),
        Row(name="exec true by crun in the guest", unit="ms", values=found.crun),
        Row(
            name=f"{container} through the agent",
            unit="ms",
            values=found.agent_whole,
            to=to,
            base=found.crun_whole,
            aim_ratio=0.5,
        ),
        Row(name=f"{container} by crun in the guest", unit="ms", values=found.crun_whole),
    ]


@dataclass(frozen=True)
class _Found:
    """Milliseconds: of execs, and of whole containers."""

    by_ctr: list[float] = field(default_factory=list)
    agent: list[float] = field(default_factory=list)
    crun: list[float] = field(default_factory=list)
    agent_whole: list[float] = field(default_factory=list)
    crun_whole: list[float] = field(default_factory=list)


def _vm_spec(config: Path, folder: Path, step: Callable[[str], None]) -> VmSpec:
    """The machine that the shim makes with this configuration, with crun, and our program in front of the agent."""
    exported = folder / "shared"
    exported.mkdir(parents=True)
    spec = plan(load(config).config, "guest-exec", exported=exported)
    busybox = shutil.which("busybox")
    if spec.initrd is None or busybox is None:
        raise BenchError("the exec in the guest needs a configuration with an initrd, and busybox")
    archive = spec.initrd.read_bytes()
    interpreter = _INTERPRETER.search(archive)
    if interpreter is None:
        raise BenchError(f"{spec.initrd} has no agent of kata-py in it that could be read")
    tree = Tree()
    tree.file("/bench/init", interpreter[0] + GUEST_PROGRAM.read_bytes(), mode=0o755)
    tree.directory(f"{_ROOTFS}/proc")
    tree.directory(f"{_ROOTFS}/dev")
    tree.file(f"{_ROOTFS}/bin/busybox", Path(busybox).read_bytes(), mode=0o755)
    for name in ("true", "sleep"):
        tree.symlink(f"{_ROOTFS}/bin/{name}", "busybox")
    _add_crun(tree, step)
    initrd = folder / "initrd.img"
    initrd.write_bytes(archive + tree.to_cpio())
    words = f"{spec.kernel_params} rdinit=/bench/init".strip()
    return dataclasses.replace(spec, run_dir=folder / "run", initrd=initrd, kernel_params=words)


def _add_crun(tree: Tree, step: Callable[[str], None]) -> None:
    """The distribution's crun with its libraries, and bundles of containers like those that the agent makes."""
    step("fetching crun")
    arch = host_arch()
    apt = Apt(cache_dir() / f"default-{arch}" / "bench", arch=arch, suite=None)
    try:
        apt.refresh(step)
        root = apt.unpack("crun", apt.closure(["crun"]), step)
        Contents(tree, root).program("crun", root.find("usr/bin/crun"), "/usr/bin/crun")
    except ImageError as err:
        raise BenchError(f"crun for the guest: {err}") from err
    for bundle, *words in (("bundle", "sleep", "1000000"), ("whole", "true")):
        document = _document(words, f"/kata/crun-{bundle}")
        tree.file(f"/bench/{bundle}/config.json", json.dumps(document).encode())


def _document(words: Sequence[str], cgroup: str) -> dict[str, object]:
    return {
        "ociVersion": "1.0.2",
        "root": {"path": _ROOTFS},
        "process": {
            "args": list(words),
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "mounts": [
            {"destination": f"/{name}", "type": kind, "source": kind}
            for name, kind in (("proc", "proc"), ("dev", "tmpfs"))
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "cgroupsPath": cgroup},
    }


async def _execs(
    spec: VmSpec, count: int, argv: Callable[[], Sequence[str]], step: Callable[[str], None]
) -> _Found:
    """Raises BenchError, HypervisorError, TimeoutError."""
    if spec.ready_vport is None:
        raise BenchError("the guest does not say when it is ready")
    step("booting a guest")
    ready: asyncio.Queue[socket.socket] = asyncio.Queue()
    async with AsyncExitStack() as undo, asyncio.timeout(LIMIT_S):
        machine = await undo.enter_async_context(booted(spec, listeners={spec.ready_vport: ready.put_nowait}))
        (await ready.get()).close()
        client = await undo.enter_async_context(Client.from_socket(await machine.vsock.connect(AGENT_PORT)))
        agent = AgentClient(client)
        await _start_container(agent)
        crun = undo.enter_context(await machine.vsock.connect(CRUN_PORT))
        found = _Found()
        for index in range(count + 1):
            if index == 1:  # the first of each does not count
                found = _Found()
            step("warming up" if index == 0 else f"exec and container {index} of {count}")
            found.by_ctr.append(await asyncio.to_thread(timed, argv()) * 1000)
            found.agent.append(await _exec(agent, f"e{index}"))
            found.crun.append(await _crun(crun, CRUN_EXEC))
            found.agent_whole.append(await _whole_container(agent, f"w{index}"))
            found.crun_whole.append(await _crun(crun, CRUN_WHOLE))
        return found


async def _start_container(agent: AgentClient) -> None:
    await agent.create_sandbox(pb.CreateSandboxRequest(hostname="bench", sandbox_id="bench"))
    await _make_container(agent, _CONTAINER, "sleep", "1000000")


async def _make_container(agent: AgentClient, container_id: str, *args: str) -> None:
    mounts = (("/proc", "proc"), ("/dev", "tmpfs"))
    spec = oci_pb2.Spec(
        Version="1.0.2",
        Process=_process(*args),
        Root=oci_pb2.Root(Path=_ROOTFS),
        Mounts=[oci_pb2.Mount(destination=path, type=kind, source=kind) for path, kind in mounts],
        Linux=oci_pb2.Linux(Namespaces=[oci_pb2.LinuxNamespace(Type="mount")]),
    )
    await agent.create_container(pb.CreateContainerRequest(container_id=container_id, OCI=spec))
    await agent.start_container(pb.StartContainerRequest(container_id=container_id))


def _process(*args: str) -> oci_pb2.Process:
    return oci_pb2.Process(User=oci_pb2.User(), Args=args, Env=["PATH=/bin"], Cwd="/")


async def _exec(agent: AgentClient, exec_id: str) -> float:
    began = time.perf_counter()
    await agent.exec_process(
        pb.ExecProcessRequest(container_id=_CONTAINER, exec_id=exec_id, process=_process("true"))
    )
    await _ends_well(agent, _CONTAINER, exec_id)
    return (time.perf_counter() - began) * 1000


async def _whole_container(agent: AgentClient, container_id: str) -> float:
    began = time.perf_counter()
    await _make_container(agent, container_id, "true")
    await _ends_well(agent, container_id, container_id)
    await agent.remove_container(pb.RemoveContainerRequest(container_id=container_id))
    return (time.perf_counter() - began) * 1000


async def _ends_well(agent: AgentClient, container_id: str, exec_id: str) -> None:
    answer = await agent.wait_process(pb.WaitProcessRequest(container_id=container_id, exec_id=exec_id))
    if answer.status != 0:
        raise BenchError(f"true ended with {answer.status} in the guest")


async def _crun(crun: socket.socket, what: bytes) -> float:
    """Milliseconds of it in the guest."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(crun, what)
    line = b""
    while not line.endswith(b"\n"):
        piece = await loop.sock_recv(crun, 64)
        if not piece:
            raise BenchError("the program beside the agent is gone")
        line += piece
    if int(line) < 0:
        raise BenchError("crun in the guest failed")
    return int(line) / 1e6

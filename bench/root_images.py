"""Starts of a guest from root images beside those from the initrd with the same files, and what the guest then uses."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple

from agent_proto.client import AgentClient
from agent_proto.gen import agent_pb2 as pb
from bench import ROOT
from bench.errors import BenchError
from bench.lab import LIMIT_S
from bench.rows import Row
from config import load
from guest_image import ImageError, Manifest
from hypervisor.qemu.machine import booted
from hypervisor.verity import Verity
from shim.plan import plan
from ttrpc import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from bench.lab import Lab
    from hypervisor.spec import RootfsDriver, RootfsType, VmSpec

AGENT_PORT = 1024
_MEMORY = re.compile(r'kata_guest_meminfo\{item="(MemTotal|MemAvailable)"\} (\d+)')
_INITRD = "initrd"
_DRIVERS: dict[str, RootfsDriver] = {"disk": "virtio-blk", "pmem": "nvdimm"}
_KINDS: tuple[RootfsType, ...] = ("ext4", "erofs")


class _Start(NamedTuple):
    """Seconds until the agent has said that it listens, and MB in use in the guest."""

    ready_s: float
    used_mb: float


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """One after the other, in turn; the first of each does not count."""
    initrd = _vm_spec(lab.config, lab.folder / "root-images")
    specs = {_INITRD: initrd}
    for kind in _KINDS:
        for name, driver in _DRIVERS.items():
            specs[f"{kind}, {name}"] = _on_image(initrd, kind, driver, verity=False)
            specs[f"{kind}, {name}, dm-verity"] = _on_image(initrd, kind, driver, verity=True)
    found: dict[str, list[_Start]] = {name: [] for name in specs}
    try:
        for index in range(runs + 1):
            for name, spec in specs.items():
                step(f"{name}: {'warming up' if index == 0 else f'start {index} of {runs}'}")
                found[name].append(asyncio.run(_start(spec)))
    except TimeoutError as err:
        raise BenchError(f"the guest did not answer within {LIMIT_S:.0f} s") from err
    base = found[_INITRD][1:]
    rows = []
    for name, (_first, *starts) in found.items():
        times, used = [start.ready_s for start in starts], [start.used_mb for start in starts]
        to = "" if name == _INITRD else _INITRD
        rows += [
            Row(name=f"{name}: listening", unit="s", values=times, to=to,
                base=[start.ready_s for start in base] if to else ()),
            Row(name=f"{name}: in use in the guest", unit="MB", values=used, to=to,
                base=[start.used_mb for start in base] if to else ()),
        ]  # fmt: skip
    return rows


def _vm_spec(config: Path, folder: Path) -> VmSpec:
    exported = folder / "shared"
    exported.mkdir(parents=True)
    spec = plan(load(config).config, "root-images", exported=exported)
    return dataclasses.replace(spec, run_dir=folder / "run")


def _on_image(spec: VmSpec, kind: RootfsType, driver: RootfsDriver, *, verity: bool) -> VmSpec:
    folder = ROOT / "build" / f"guest-{kind}"
    try:
        manifest = Manifest.read(folder / "manifest.json")
    except ImageError as err:
        raise BenchError(f"{err}; `make root-images` builds it") from err
    return dataclasses.replace(
        spec,
        kernel=folder / "vmlinux",
        initrd=None,
        image=folder / "rootfs.img",
        image_initrd=folder / "image-initrd.img",
        image_bytes=manifest.image_bytes,
        rootfs_type=kind,
        rootfs_driver=driver,
        verity=Verity.parse(manifest.kernel_verity_params) if verity else None,
    )


async def _start(spec: VmSpec) -> _Start:
    """Raises BenchError, HypervisorError, TimeoutError."""
    if spec.ready_vport is None:
        raise BenchError("the guest does not say when it is ready")
    ready: asyncio.Queue[socket.socket] = asyncio.Queue()
    began = time.perf_counter()
    async with AsyncExitStack() as undo, asyncio.timeout(LIMIT_S):
        machine = await undo.enter_async_context(booted(spec, listeners={spec.ready_vport: ready.put_nowait}))
        (await ready.get()).close()
        took = time.perf_counter() - began
        client = await undo.enter_async_context(Client.from_socket(await machine.vsock.connect(AGENT_PORT)))
        metrics = (await AgentClient(client).get_metrics(pb.GetMetricsRequest())).metrics
    memory = {name: int(value) for name, value in _MEMORY.findall(metrics)}
    return _Start(took, (memory["MemTotal"] - memory["MemAvailable"]) / 1e6)

"""What a configuration makes the shim do, as one text: a whole sandbox is brought up with a container in it.

The configuration, the boot, the sandbox and the calls to the agent are real; QEMU, virtiofsd, the host's directories
and the agent behind the calls are not. Two configurations do the same when their texts are the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import structlog
from structlog.testing import capture_logs

from hypervisor.accel import Choice
from hypervisor.errors import BootFailed
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.qemu.disk import DiskAddress
from hypervisor.qemu.nic import NicFds
from netlink.objects import IFF_UP, Link
from shim import agent as agent_of_shim
from shim import agent_log, boot, creation, crossing, mounts, network, passthrough, paths, plan, sandbox
from shim.agent import connected
from shim.errors import ShimError
from shim.interfaces import Interface, Snapshot
from shim.io import Stdio
from shim.share import GUEST_PASSTHROUGH
from tests.support.fake_agent import FakeAgent
from tests.support.fake_sysfs import FakeSysfs
from tests.unit.hypervisor.test_confidential import SNP, TDX, cpuid, host
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import pytest

    from agent_proto.client import AgentClient
    from config.schema import Qemu
    from hypervisor import host as hosts
    from hypervisor.spec import Disk, VmSpec
    from hypervisor.vfio import HostDevice
    from netlink.rtnl import Rtnetlink

SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"args": ["true"], "cwd": "/"},
    "root": {"path": "rootfs"},
    "mounts": [
        {
            "destination": "/c",
            "type": "bind",
            "source": "pods/u/volumes/kubernetes.io~empty-dir/c",
            "options": ["rw"],
        }
    ],
    "linux": {
        "cgroupsPath": "/pods/web",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "namespaces": [{"type": "network"}],
    },
}
POD = {
    "io.kubernetes.cri.container-name": "web",
    "io.kubernetes.cri.sandbox-cpu-quota": "150000",
    "io.kubernetes.cri.sandbox-cpu-period": "100000",
    "io.kubernetes.cri.sandbox-memory": str(300 << 20),
}
# What every network namespace has.
ETH0 = Interface(Link(2, "eth0", "0a:58:0a:d5:00:02", 1500, IFF_UP, "veth"), ())
DIRECT = {
    "name": "eth0",
    "guest_mac": "0a:58:0a:d6:09:09",
    "device": {"type": "host-tap", "tap_name": "tap0"},
}
# Asked at any time, and with the time of day.
UNTOLD = ("GetOOMEvent", "SetGuestDateTime")
LEVELS = ("debug", "info", "warning", "error", "critical")


class Machine:
    """A machine that is there at once; its agent is refused once, and reached at the second attempt."""

    pid = 1
    timings: Mapping[str, float] = {}
    pids: Mapping[str, int] = {}

    def __init__(self, agent: Path, seen: list[str]) -> None:
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.vsock = self.monitor = self
        self._agent = agent
        self._seen = seen
        self._attempts = 0

    async def connect(self, port: int) -> socket.socket:
        self._seen.append(f"connect to port {port}")
        self._attempts += 1
        if self._attempts == 1:
            raise ConnectionRefusedError("not yet")
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(self._agent))
        return connection

    async def execute(self, command: str, arguments: object = None) -> list[object]:
        self._seen.append(f"monitor: {command}")
        return []

    def last_progress(self) -> float:
        return asyncio.get_running_loop().time()

    async def plug_disk(self, disk: Disk, fd: int) -> DiskAddress:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._seen.append(f"plugged in: {path}, discard={disk.discard}")
        return DiskAddress("blk", "1e/01")

    async def unplug_disk(self, disk_id: str) -> None:
        """Nothing is to be seen of it."""

    async def plug_host_device(self, device: HostDevice) -> None:
        self._seen.append(f"plugged in: {device.address}")

    async def unplug_host_device(self, device: HostDevice) -> None:
        """Nothing is to be seen of it."""

    async def pci_path(self, device_id: str) -> str:
        return "02/00"

    async def stop(self) -> None:
        """Nothing to stop."""

    def failure(self, what: str, why: str = "") -> BootFailed:
        return BootFailed(what, why, "remedy")


class Share:
    """The shared directory, in name only."""

    host_mounts = None

    def __init__(self, folder: Path, seen: list[str]) -> None:
        self.exported = folder / "ro"
        self._seen = seen

    def add_sandbox_mounts(self, entries: tuple[str, ...]) -> None:
        self._seen.append(f"seen by every guest: {entries}")

    def add_rootfs(self, *_: object) -> str:
        return "/rootfs"

    def add_volume(self, *_: object) -> tuple[str, tuple[str, ...]]:
        return f"{GUEST_PASSTHROUGH}/c", ()

    def on_host(self, _: str) -> Path:
        """The volume is a socket."""
        return self.exported.with_name("agent.sock")

    def rootfs(self, _: str) -> Path:
        return self.exported


class Host:
    """The host's side of the sandbox."""

    def __init__(self, folder: Path, seen: list[str]) -> None:
        self.run_dir = folder
        self.share = Share(folder, seen)
        self._seen = seen

    def create(self) -> None:
        """Nothing to make."""

    def remember_helpers(self, pids: Mapping[str, int]) -> None:
        """Nobody has to find them."""

    def own_cgroup(self, pod: str, overhead: str = "") -> Host:
        """Nothing is moved; and what is done beside the start, at any time, is not."""
        if overhead:
            raise OSError(30, "Read-only file system")
        self._seen.append(f"control group {pod}")
        return self

    def create_and_join(self, pids: list[int]) -> None:
        """Nothing is moved."""

    def remember_network(self, netns: Path, ifindexes: list[int]) -> None:
        """Nobody has to undo anything."""


async def done_by(
    folder: Path,
    text: str,
    annotations: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    host_device: str = "",
) -> str:
    """What happens with this configuration. `folder` is the test's own, and shown as @. The container asks for a device
    of the host if one is named.
    """
    (folder / "configuration.toml").write_text(text)
    spec = SPEC | {"annotations": {**POD, **annotations}}
    if host_device:
        wanted = {"path": host_device, "type": "c", "major": 240, "minor": 0}
        spec = spec | {"linux": {**spec["linux"], "devices": [wanted]}}
    (folder / "config.json").write_text(json.dumps(spec))
    (folder / "dans").mkdir(exist_ok=True)
    (folder / SPEC["mounts"][0]["source"]).mkdir(parents=True, exist_ok=True)
    (folder / "dans" / "s1.json").write_text(json.dumps({"devices": [DIRECT]}))
    seen: list[str] = []
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(paths, "RUN_ROOT", str(folder / "run"))
        patch.setattr(plan, "Host", lambda: _able_host(folder / "host", snp="sev_snp_guest" in text))
        patch.setattr(passthrough, "Host", lambda: _host_with_a_device(folder / "sysfs"))
        patch.setenv("KATA_CONF_FILE", str(folder / "configuration.toml"))
        patch.setattr(plan, "choose_accel", lambda wanted, **_: Choice("tcg" if wanted == "tcg" else "kvm"))
        patch.setattr(
            plan, "choose_vsock", lambda wanted, **_: Choice("vhost" if wanted == "vhost" else "user")
        )
        patch.setattr(network, "new_netns", lambda: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        patch.setattr(network, "entered", lambda netns: nullcontext())
        patch.setattr(network, "scan", lambda rtnl: Snapshot((ETH0,)))
        patch.setattr(crossing, "join", partial(_join, seen))
        patch.setattr(crossing, "part", lambda rtnl, ifindex: None)
        # Whatever the tests' own directories are on.
        patch.setattr(mounts, "in_memory", lambda path: False)
        patch.setattr(boot, "booted", lambda spec, listeners: _booted(spec, folder, seen))
        patch.setattr(agent_log, "forward", lambda machine, port, least: _forward(seen, port, least))
        patch.setattr(agent_of_shim, "connected", lambda *args: _connected(seen, *args))
        try:
            (folder / "run" / "s1").mkdir(parents=True)
            async with FakeAgent(folder / "agent.sock") as agent:
                await asyncio.sleep(0)  # it takes its socket
                await _bring_up(folder, seen)
                requests = [request for request in agent.requests.items if request.method not in UNTOLD]
            seen += [f"{request.method} {request.message}" for request in requests]
        finally:
            structlog.reset_defaults()
            shutil.rmtree(folder / "run")
            (folder / "agent.sock").unlink()
    seen += [f"next attempt after {line['retry_s']} s" for line in logs if line["event"] == "agent_refused"]
    # The namespace's descriptor has another number each time.
    return re.sub("/proc/self/fd/[0-9]+", "/proc/self/fd/N", "\n".join(seen).replace(str(folder), "@"))


@asynccontextmanager
async def _booted(spec: VmSpec, folder: Path, seen: list[str]) -> AsyncIterator[Machine]:
    fds = Fds(
        qmp=10,
        console=11,
        vsock=12,
        guest_cid=3,
        shares=tuple(13 for _ in spec.shares),
        initdata=15,
        nics=tuple(NicFds((14,)) for _ in spec.nics),
        host_devices=tuple(None for _ in spec.host_devices),
    )
    argv = build_cmdline(spec, fds)
    seen += [*argv, str(spec)]
    yield Machine(folder / "agent.sock", seen)


def _join(seen: list[str], rtnl: Rtnetlink, link: Link, settings: Qemu, *, macvtap: bool) -> None:
    rates = settings.rx_rate_limiter_max_rate, settings.tx_rate_limiter_max_rate
    seen.append(f"{link.name} joined, macvtap={macvtap}, bits per second in and out: {rates}")


def _connected(seen: list[str], *args: Any) -> AbstractAsyncContextManager[AgentClient]:
    *_, patience_s = args
    seen.append(f"patience with the guest: {patience_s} s")
    return connected(*args)


async def _forward(seen: list[str], port: int, least: int) -> None:
    seen.append(f"agent's log from port {port}, level {least}")


def _able_host(root: Path, *, snp: bool) -> hosts.Host:
    """A host with two NUMA nodes that can hide guests in one of the ways."""
    if not root.exists():
        cpuid(root, 0, 51 | 5 << 6, 0, 0)
    files = {
        "dev/kvm": "",
        "dev/vhost-vsock": "",
        "proc/cpuinfo": "flags : vmx svm\n",
        TDX: "YN"[snp],
        SNP: "NY"[snp],
        "sys/devices/system/node/online": "0-1\n",
        "sys/devices/system/node/has_memory": "0-1\n",
    }
    return host(root, files)


def _host_with_a_device(root: Path) -> hosts.Host:
    fresh = not root.exists()
    sysfs = FakeSysfs(root)
    if fresh:
        sysfs.pci("0000:3b:00.0", "12")
    return sysfs.host


async def _bring_up(folder: Path, seen: list[str]) -> None:
    """All of a sandbox's start, up to the creation of its first container."""
    bootstrap: Any = SimpleNamespace(id="s1", options=b"", sandbox_api=False, bundle=str(folder), debug=False)
    ours: Any = Host(folder, seen)
    start = boot.Boot(bootstrap, ours, 0.0)
    if start.failure is not None:
        seen.append(f"failure: {start.failure}")
        return
    with capture_logs() as lines:
        for level in LEVELS:
            getattr(structlog.get_logger(), level)("said")
    seen.append(f"logged: {[line['log_level'] for line in lines]}")
    pod = sandbox.Sandbox(
        "s1", start, ours.share, cast("Any", _Events()), namespace="n", outlives_containers=False
    )
    pod.bring_up()
    request = creation.CreateRequest("s1", folder, (), Stdio("", "", "", False))
    try:
        try:
            await pod.create_container(request)
        except (ShimError, RpcError) as err:
            seen.append(f"no container: {err}")
        running = pod._running
        if running is None:
            await pod._guest()
        else:
            limits = vars(running.agent) | vars(running.guest.liveness)
            seen += [
                f"{name}: {limits[name]}"
                for name in ("_timeout_s", "_create_container_timeout_s", "_check_s")
            ]
            seen.append(f"a guest that does not answer is kept: {limits['_end_guest'] is None}")
    except Exception as err:
        seen.append(f"failure: {err}")
    finally:
        await pod.stop()


class _Events:
    """Events that nobody reads."""

    def publish(self, event: object) -> None:
        """Forget it."""

"""Devices of the host come and go while a machine runs: what QEMU is told, and what is told of its refusals."""

from __future__ import annotations

import asyncio
import os
import resource
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.arch import arch_named
from hypervisor.errors import DeviceUnavailable, HostUnsupported, HotplugRefused, InvalidSpec
from hypervisor.process import spawned
from hypervisor.qemu import ports
from hypervisor.qemu import vfio as qemu_vfio
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.qemu.qmp import connected
from hypervisor.qemu.vfio import HostDevices, locked_bytes, opened
from hypervisor.rootless import User
from hypervisor.spec import QmpTimeouts, VmSpec
from hypervisor.vfio import HostDevice
from tests.unit.hypervisor.test_qmp import Peer, greets, ignore, monitors_at, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hypervisor.qemu.qmp import Monitor

GPU = HostDevice(kind="pci", address="0000:3b:00.0", group="12", vendor=0x10DE, device=0x2331)
SOUND = replace(GPU, address="0000:3b:00.1", device=0x22B9)
OWN = replace(GPU, group="vfio0", own_file=Path("/dev/null"))
QUEUES = HostDevice(
    kind="ap", address="0a0b0c0d-1111-2222-3333-444455556666", group="41", queues=("05.0004",)
)
PC, ARM, MAINFRAME = map(arch_named, ("x86_64", "aarch64", "s390x"))
PATIENT = QmpTimeouts(read_timeout_s=30, connect_timeout_s=60, command_timeout_s=60)
CAP_SYS_RESOURCE = 24  # <linux/capability.h>
USER = User(uid=1879048192, gid=1879048192)


def spec(**fields: Any) -> VmSpec:
    words: dict[str, Any] = {
        "name": "test", "run_dir": Path("/run"), "qemu_path": Path("/qemu"), "kernel": Path("/vmlinux"),
        "vsock": None, "host_device_places": 1,
    }  # fmt: skip
    return VmSpec(**{**words, **fields})


class Qemu:
    """QEMU's side: it has the ports of a command line, and does what it is told unless it is to refuse."""

    def __init__(self, of: VmSpec, *, refuses: str = "", keeps: bool = False) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._refuses = refuses
        self._keeps = keeps
        argv = build_cmdline(of, Fds(qmp=3, console=4, host_devices=tuple(None for _ in of.host_devices)))
        self._devices: dict[str, tuple[str, int]] = {}
        for word in argv:
            names = dict(part.split("=", 1) for part in word.split(",") if "=" in part)
            if word.startswith(("pcie-root", "x3130", "xio3130", "pci-bridge", "vfio")) and "id" in names:
                self._devices[names["id"]] = (names["bus"], int(names.get("addr", "0"), 16))

    async def __call__(self, peer: Peer) -> None:
        await greets(peer)
        while True:
            message = await peer.receive()
            name, words = message["execute"], message.get("arguments") or {}
            self.asked.append((name, words))
            if name == self._refuses:
                error = {"class": "GenericError", "desc": "vfio 0000:3b:00.0: group 12 is not viable"}
                peer.send({"error": error, "id": message["id"]})
                continue
            answer: object = {}
            if name == "query-pci":
                answer = [{"bus": 0, "devices": self._below("pcie.0")}]
            elif name == "device_add":
                slot = int(str(words.get("addr", "0")), 16)
                self._devices[words["id"]] = (words.get("bus", ""), slot)
            peer.send({"return": answer, "id": message["id"]})
            if name == "device_del" and not self._keeps:
                del self._devices[words["id"]]
                event = {"event": "DEVICE_DELETED", "data": {"device": words["id"], "path": "/"}}
                peer.send({**event, "timestamp": {"seconds": 1, "microseconds": 2}})

    def _below(self, bus: str) -> list[dict[str, Any]]:
        return [
            {"slot": slot, "function": 0, "qdev_id": name, "pci_bridge": {"devices": self._below(name)}}
            for name, (parent, slot) in self._devices.items()
            if parent == bus
        ]

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, words) for name, words in self.asked if name not in ("query-pci", "qmp_capabilities")]


@asynccontextmanager
async def monitor_of(qemu: Qemu, folder: Path) -> AsyncIterator[Monitor]:
    path = folder / "qmp.sock"
    async with monitors_at(path, qemu), connected(path, PATIENT, running(), ignore) as monitor:
        yield monitor


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("root-port", {"bus": "rp0"}, {"bus": "rp1"}),
        ("switch-port", {"bus": "swdp0"}, {"bus": "swdp1"}),
        ("bridge-port", {"bus": "vfio-bridge", "addr": "0x1"}, {"bus": "vfio-bridge", "addr": "0x2"}),
    ],
)
async def test_a_port_is_taken_and_is_free_again(
    tmp_path: Path, kind: Any, first: dict[str, str], second: dict[str, str]
) -> None:
    machine = spec(host_device_port=kind, host_device_places=2)
    qemu, devices = Qemu(machine), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        await devices.plug(monitor, GPU, PC)
        await devices.plug(monitor, SOUND, PC)
        await devices.unplug(monitor, GPU)
        await devices.plug(monitor, GPU, PC)
    ids = {"x-pci-vendor-id": 0x10DE, "x-pci-device-id": 0x2331}
    gpu = {"driver": "vfio-pci", "id": "vfio-0000-3b-00.0", "host": "0000:3b:00.0", **first, **ids}
    sound = {**gpu, "id": "vfio-0000-3b-00.1", "host": "0000:3b:00.1", **second, "x-pci-device-id": 0x22B9}
    assert qemu.told() == [
        ("device_add", gpu),
        ("device_add", sound),
        ("device_del", {"id": "vfio-0000-3b-00.0"}),
        ("device_add", gpu),
    ]


async def test_one_that_does_not_go_delays_no_other(tmp_path: Path) -> None:
    machine = spec(host_device_places=2)
    qemu, devices = Qemu(machine, keeps=True), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        await devices.plug(monitor, GPU, PC)
        going = asyncio.create_task(devices.unplug(monitor, GPU))
        while qemu.told()[-1][0] != "device_del":
            await asyncio.sleep(0)
        await devices.plug(monitor, SOUND, PC)
        assert not going.done()
        assert qemu.told()[-1][1]["bus"] == "rp1"
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)


async def test_ports_of_devices_from_the_start_are_taken(tmp_path: Path) -> None:
    machine = spec(host_devices=(GPU,))
    qemu, devices = Qemu(machine), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        await devices.plug(monitor, SOUND, PC)
        ((_, words),) = qemu.told()
        assert words["bus"] == "rp1"
        with pytest.raises(HotplugRefused) as refused:
            await devices.plug(monitor, replace(SOUND, address="0000:3b:00.2"), PC)
    assert str(refused.value) == (
        "device 0000:3b:00.2 of the host cannot be plugged in: no root-port of the guest is free; "
        "set pcie_root_port to a greater number"
    )


async def test_own_files_are_handed_over_with_what_all_of_them_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_vfio, "IOMMU_FILE", "/dev/zero")
    machine = spec(host_device_places=2)
    qemu, devices = Qemu(machine), HostDevices(machine)
    before = len(os.listdir("/proc/self/fd"))
    async with monitor_of(qemu, tmp_path) as monitor:
        during = len(os.listdir("/proc/self/fd"))
        await devices.plug(monitor, OWN, PC)
        await devices.plug(monitor, replace(OWN, address="0000:3b:00.1"), PC)
        assert len(os.listdir("/proc/self/fd")) == during
    assert len(os.listdir("/proc/self/fd")) == before
    names = [name for name, _ in qemu.told()]
    assert names == ["getfd", "object-add", "getfd", "device_add", "getfd", "device_add"]
    words = dict(qemu.told()[3][1])
    assert (words["iommufd"], words["fd"], "host" in words) == ("iommufd0", OWN.id, False)
    assert qemu.told()[1][1] == {"qom-type": "iommufd", "id": "iommufd0", "fd": "iommufd0"}


async def test_a_refusal_is_one_line_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_vfio, "IOMMU_FILE", "/dev/zero")
    machine = spec()
    for device, left_over in ((GPU, []), (OWN, ["closefd"])):
        qemu, devices = Qemu(machine, refuses="device_add"), HostDevices(machine)
        async with monitor_of(qemu, tmp_path) as monitor:
            with pytest.raises(HotplugRefused) as refused:
                await devices.plug(monitor, device, PC)
        assert str(refused.value) == (
            f"device 0000:3b:00.0 of the host ({device.file}) was not plugged in: QEMU refused device_add: "
            "vfio 0000:3b:00.0: group 12 is not viable (GenericError); no other program may have it open, and all of "
            "its group has to be bound to vfio-pci; `kata-py check` looks"
        )
        assert [name for name, _ in qemu.told()][-1:] == (left_over or ["device_add"])


async def test_an_older_qemu_has_no_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_vfio, "IOMMU_FILE", "/dev/zero")
    machine = spec()
    qemu, devices = Qemu(machine, refuses="object-add"), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        with pytest.raises(HotplugRefused, match=r"install QEMU 9\.0 or later"):
            await devices.plug(monitor, OWN, PC)
    assert [name for name, _ in qemu.told()] == ["getfd", "object-add", "closefd"]


async def test_crypto_adapters_need_no_port(tmp_path: Path) -> None:
    machine = spec(arch="s390x", host_device_places=0)
    qemu, devices = Qemu(machine), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        await devices.plug(monitor, QUEUES, MAINFRAME)
        for device, arch in ((QUEUES, PC), (GPU, MAINFRAME)):
            with pytest.raises(InvalidSpec, match=device.address):
                await devices.plug(monitor, device, arch)
    words = {"driver": "vfio-ap", "id": QUEUES.id, "sysfsdev": QUEUES.sysfs}
    assert qemu.told() == [("device_add", words)]


async def test_a_qemu_that_is_not_root_has_to_open_the_group(tmp_path: Path) -> None:
    machine = spec(user=USER)
    qemu, devices = Qemu(machine), HostDevices(machine)
    async with monitor_of(qemu, tmp_path) as monitor:
        with pytest.raises(HostUnsupported, match=r"/dev/vfio/vfio as another user than root; open it"):
            await devices.plug(monitor, GPU, PC)
    assert qemu.told() == []


async def test_the_limit_is_there_from_the_start() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    script = "import resource; print(resource.getrlimit(resource.RLIMIT_MEMLOCK))"
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, hard))
    try:
        for wanted, given in ((1 << 20, 1 << 20), (1 << 12, 1 << 16)):
            argv = ["/usr/bin/python3", "-c", script]
            async with spawned(argv, user=USER, locked_bytes=wanted) as program:
                await program.wait()
            assert program.output_tail() == [f"({given}, {hard})"]
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        ({}, 3),
        ({"max_memory_mib": 4096}, 5),
        ({"iommu": True}, 7),
    ],
)
def test_how_much_it_may_lock(fields: dict[str, Any], gib: int) -> None:
    """With two devices at first, and room for one."""
    assert locked_bytes(spec(memory_mib=2048, host_devices=(GPU, SOUND), **fields)) == gib << 30


async def test_more_than_the_shim_may_allow_is_told() -> None:
    """Root of a container may often not raise limits."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    told = ""
    try:
        async with spawned(["/usr/bin/true"], user=USER, locked_bytes=1 << 62):
            pass
    except HostUnsupported as err:
        told = str(err)
    may_raise = bool(capabilities >> CAP_SYS_RESOURCE & 1)
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert (told == "") is (may_raise or hard == resource.RLIM_INFINITY)
    assert told == "" or told.endswith(
        "Operation not permitted; the shim needs CAP_SYS_RESOURCE, or a greater limit (LimitMEMLOCK of "
        "containerd's unit)"
    )


def test_a_file_that_does_not_open() -> None:
    missing = replace(OWN, own_file=Path("/dev/vfio/devices/none"))
    with (
        ExitStack() as undo,
        pytest.raises(DeviceUnavailable, match=r"^cannot open /dev/vfio/devices/none: No such"),
    ):
        opened([GPU, missing], undo)


@pytest.mark.parametrize(
    ("arch", "fields", "told"),
    [
        (PC, {"host_device_places": 17}, "17 PCIe ports are more than 16"),
        (
            PC,
            {"host_device_port": "bridge-port", "host_device_places": 31},
            "31 devices are more than the 30",
        ),
        (PC, {"host_device_port": "root-port", "pcie_switch_ports": 1}, "set one of pcie_root_port"),
        (MAINFRAME, {}, "s390x guests have no PCIe ports"),
        (ARM, {"host_device_port": "bridge-port"}, "set hot_plug_vfio to root-port"),
    ],
)
def test_ports_that_a_machine_cannot_have(arch: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        list(ports.spare_ports(spec(**fields), arch))


def test_own_files_have_to_be_open() -> None:
    with pytest.raises(InvalidSpec, match="needs open files of its own and of /dev/iommu"):
        build_cmdline(spec(host_devices=(OWN,)), Fds(qmp=3, console=4, host_devices=(None,)))

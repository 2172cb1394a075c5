"""Devices of the host for a pod: who asks for them, how its machine gets them, and what its agent is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from agent_proto.gen import oci_pb2
from config import Config
from config.schema import Qemu, Runtime
from hypervisor.errors import DeviceUnavailable, HotplugRefused, InvalidSpec
from shim.bundle import Bundle, Spec
from shim.errors import DevicesUnknown, InvalidRequest
from shim.passthrough import PodDevices
from shim.pod import Pod
from tests.support.fake_kubelet import kubelet, pod
from tests.support.fake_sysfs import FakeSysfs

if TYPE_CHECKING:
    from hypervisor.qemu.machine import Machine
    from hypervisor.vfio import HostDevice

GPU, SOUND, NIC = "0000:3b:00.0", "0000:3b:00.1", "0000:81:00.0"
UUID = "0a0b0c0d-1111-2222-3333-444455556666"
ALL_ALLOWED = {"allow": True, "access": "rwm"}


class QemuMachine:
    """What a machine is told about devices; each is behind a port of its own."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.told: list[str] = []
        self.refuses: set[str] = set()

    async def plug_host_device(self, device: HostDevice) -> None:
        self._tell("plug", device)

    async def unplug_host_device(self, device: HostDevice) -> None:
        self._tell("unplug", device)

    async def pci_path(self, device_id: str) -> str | None:
        return None if "lost" in self.refuses else f"02/{device_id[-1]}0"

    def _tell(self, verb: str, device: HostDevice) -> None:
        self.told.append(f"{verb} {device.address}")
        if device.address in self.refuses:
            raise HotplugRefused(f"cannot {verb} {device.address}")


class World:
    """A host with a GPU and its sound device in group 12, a NIC in group 13, and a folder for CDI."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sysfs = FakeSysfs(folder / "host")
        self.sysfs.pci(GPU, "12")
        self.sysfs.pci(SOUND, "12", device_class=0x040300)
        self.sysfs.pci(NIC, "13", device_class=0x020000)
        self.machine = QemuMachine()
        (folder / "cdi").mkdir()

    def devices(self, *, mode: str = "guest-kernel", sock: str = "", **qemu: Any) -> PodDevices:
        settings = Config(
            hypervisor=Qemu(**qemu), runtime=Runtime(vfio_mode=cast("Any", mode), pod_resource_api_sock=sock)
        )
        return PodDevices(settings, host=self.sysfs.host, cdi_folders=[self.folder / "cdi"])

    def describe(self, kind: str, **devices: str) -> None:
        spec: dict[str, Any] = {"cdiVersion": "0.5.0", "kind": kind, "devices": []}
        for name, path in devices.items():
            spec["devices"].append({"name": name, "containerEdits": {"deviceNodes": [{"path": path}]}})
        (self.folder / "cdi" / f"{kind.replace('/', '-')}.json").write_text(json.dumps(spec))

    async def give(self, devices: PodDevices, container_id: str, *files: str, **annotations: str) -> Any:
        wanted = devices.wanted_by(container(*files, **annotations), privileged=False)
        return await devices.give(container_id, wanted, self.qemu)

    @property
    def qemu(self) -> Machine:
        return cast("Machine", self.machine)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def container(*files: str, **annotations: str) -> oci_pb2.Spec:
    spec = oci_pb2.Spec(Annotations={f"cdi.k8s.io/{key}": value for key, value in annotations.items()})
    for path in files:
        spec.Linux.Devices.add(Path=path, Type="c", Major=240, Minor=1)
    return spec


def bundle(*files: str, rules: list[dict[str, Any]] | None = None) -> Bundle:
    linux = {"devices": [{"path": path} for path in files], "resources": {"devices": rules or []}}
    return Bundle("c", Path("/"), msgspec.convert({"linux": linux}, Spec), {})


def files_of(spec: oci_pb2.Spec) -> list[str]:
    return [device.Path for device in spec.Linux.Devices]


async def test_nothing_is_given_unless_the_configuration_says_so(world: World) -> None:
    devices = world.devices()
    assert await devices.at_start(Pod(), bundle("/dev/vfio/12")) == ()
    with pytest.raises(InvalidRequest) as refused:
        devices.wanted_by(container("/dev/null", "/dev/vfio/vfio", "/dev/vfio/12"), privileged=False)
    assert str(refused.value) == (
        "device /dev/vfio/12 cannot be given to a guest: set hot_plug_vfio or cold_plug_vfio in [hypervisor.qemu], for "
        'example to "root-port", or run the container without it'
    )
    assert devices.wanted_by(container("/dev/null"), privileged=False) == []
    assert devices.wanted_by(container("/dev/vfio/12"), privileged=True) == []
    # For devices of other kinds, names of CDI concern nobody here.
    assert devices.wanted_by(container(x="vendor.com/camera=0"), privileged=False) == []


async def test_a_device_is_plugged_in_and_taken_back(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    (told,) = await world.give(devices, "c1", "/dev/vfio/vfio", "/dev/vfio/12")
    assert world.machine.told == [f"plug {GPU}", f"plug {SOUND}"]
    assert (told.type, told.id, told.container_path) == ("vfio-pci-gk", "12", "/dev/vfio/12")
    assert list(told.options) == [f"{GPU}=02/00", f"{SOUND}=02/10"]
    await devices.take_back("another", world.qemu)
    assert len(world.machine.told) == 2
    await devices.take_back("c1", world.qemu)
    assert world.machine.told[2:] == [f"unplug {GPU}", f"unplug {SOUND}"]
    await devices.take_back("c1", world.qemu)
    assert len(world.machine.told) == 4


async def test_containers_of_a_pod_share_a_device(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    for name in ("c1", "c2"):
        await world.give(devices, name, "/dev/vfio/13")
    await devices.take_back("c1", world.qemu)
    assert world.machine.told == [f"plug {NIC}"]
    await devices.take_back("c2", world.qemu)
    assert world.machine.told == [f"plug {NIC}", f"unplug {NIC}"]


async def test_when_one_of_several_is_refused_none_stays(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    world.machine.refuses = {SOUND}
    with pytest.raises(HotplugRefused, match=f"cannot plug {SOUND}"):
        await world.give(devices, "c1", "/dev/vfio/13", "/dev/vfio/12")
    assert world.machine.told == [
        f"plug {NIC}",
        f"plug {GPU}",
        f"plug {SOUND}",
        f"unplug {NIC}",
        f"unplug {GPU}",
    ]


async def test_one_that_is_cancelled_while_it_plugs_in_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    asked = asyncio.Event()

    async def plug(device: HostDevice) -> None:
        world.machine._tell("plug", device)
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(world.machine, "plug_host_device", plug)
    giving = asyncio.create_task(world.give(devices, "c1", "/dev/vfio/13"))
    await asked.wait()
    giving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await giving
    assert world.machine.told == [f"plug {NIC}", f"unplug {NIC}"]


async def test_a_guest_that_keeps_a_device_delays_only_who_wants_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    kept, asked, unplug = asyncio.Event(), asyncio.Event(), world.machine.unplug_host_device

    async def late(device: HostDevice) -> None:
        asked.set()
        await kept.wait()
        await unplug(device)

    monkeypatch.setattr(world.machine, "unplug_host_device", late)
    await world.give(devices, "c1", "/dev/vfio/13")
    taking = [asyncio.create_task(devices.take_back("c1", world.qemu)) for _ in range(2)]
    await asked.wait()
    same = asyncio.create_task(world.give(devices, "c2", "/dev/vfio/13"))
    async with asyncio.timeout(60):
        await world.give(devices, "c3", "/dev/vfio/12")
    assert world.machine.told == [f"plug {NIC}", f"plug {GPU}", f"plug {SOUND}"]
    kept.set()
    await asyncio.gather(same, *taking)
    assert world.machine.told[3:] == [f"unplug {NIC}", f"plug {NIC}"]


async def test_a_device_that_qemu_has_lost(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    world.machine.refuses = {"lost"}
    with pytest.raises(HotplugRefused, match=r"QEMU has no device vfio-0000-81-00\.0"):
        await world.give(devices, "c1", "/dev/vfio/13")
    assert world.machine.told == [f"plug {NIC}", f"unplug {NIC}"]


async def test_what_the_guest_keeps_is_there_for_the_next(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    await world.give(devices, "c1", "/dev/vfio/13")
    world.machine.refuses = {NIC}
    with capture_logs() as logs:
        await devices.take_back("c1", world.qemu)
    assert [(line["event"], line["device"]) for line in logs] == [("host_device_not_unplugged", NIC)]
    world.machine.told.clear()
    await world.give(devices, "c2", "/dev/vfio/13")
    assert world.machine.told == []


async def test_a_machine_that_is_gone_is_told_nothing(world: World) -> None:
    devices = world.devices(hot_plug_vfio="root-port")
    await world.give(devices, "c1", "/dev/vfio/13")
    world.machine.exited.set_result(None)
    await devices.take_back("c1", world.qemu)
    assert world.machine.told == [f"plug {NIC}"]


async def test_a_machine_starts_with_what_its_first_container_has(world: World) -> None:
    devices = world.devices(cold_plug_vfio="root-port")
    found = await devices.at_start(Pod(), bundle("/dev/vfio/vfio", "/dev/vfio/12", "/dev/fuse"))
    assert [device.address for device in found] == [GPU, SOUND]
    (told,) = await world.give(devices, "c1", "/dev/vfio/12")
    assert list(told.options) == [f"{GPU}=02/00", f"{SOUND}=02/10"]
    await devices.take_back("c1", world.qemu)
    assert world.machine.told == []
    with pytest.raises(InvalidRequest) as refused:
        await world.give(devices, "c2", "/dev/vfio/13")
    assert str(refused.value) == (
        f"device /dev/vfio/13 ({NIC}) was not known when the virtual machine started, and none is plugged in later; "
        "set hot_plug_vfio, or pod_resource_api_sock to let the kubelet tell"
    )


async def test_a_privileged_container_has_all_of_the_hosts_files(world: World) -> None:
    """They stand for those of the machine that it runs on, which is the guest."""
    devices = world.devices(cold_plug_vfio="root-port", hot_plug_vfio="root-port")
    assert await devices.at_start(Pod(), bundle("/dev/vfio/12", rules=[ALL_ALLOWED])) == ()
    assert devices.wanted_by(container("/dev/vfio/12"), privileged=True) == []
    some: list[dict[str, Any]] = [ALL_ALLOWED, {"allow": False}, {"allow": True, "type": "c", "major": 1}]
    assert len(await devices.at_start(Pod(), bundle("/dev/vfio/12", rules=some))) == 2


async def test_names_of_cdi(world: World) -> None:
    world.describe("vendor.com/gpu", a="/dev/vfio/12", b="/dev/vfio/13", c="/dev/camera")
    devices = world.devices(cold_plug_vfio="root-port", hot_plug_vfio="root-port")
    asked = Pod(annotations={"cdi.k8s.io/x": "vendor.com/gpu=a,vendor.com/gpu=c"})
    assert [device.address for device in await devices.at_start(asked, None)] == [GPU, SOUND]
    first, second = await world.give(devices, "c1", "/dev/vfio/12", x="vendor.com/gpu=a,vendor.com/gpu=b")
    assert (first.container_path, second.container_path) == ("/dev/vfio/12", "/dev/vfio/13")
    assert world.machine.told == [f"plug {NIC}"]
    with pytest.raises(DevicesUnknown, match=r"CDI device vendor\.com/gpu=z: no file in"):
        devices.wanted_by(container(x="vendor.com/gpu=z"), privileged=True)


@pytest.mark.timeout(90)
async def test_the_kubelet_tells_what_all_containers_will_ask_for(world: World) -> None:
    world.describe("vendor.com/gpu", a="/dev/vfio/12")
    path = world.folder / "kubelet.sock"
    devices = world.devices(cold_plug_vfio="root-port", sock=str(path))
    pods = [
        pod("web", devices={"vendor.com/gpu": ["a"], "intel.com/nic": [NIC], "other.com/fuse": ["7"]}),
        pod("claims", claims=["vendor.com/gpu=a"]),
        pod("wrong", claims=["vendor.com/gpu=z"]),
    ]
    with kubelet(path, pods):
        found = await devices.at_start(Pod(name="web", namespace="default"), None)
        assert [device.address for device in found] == [GPU, SOUND, NIC]
        found = await devices.at_start(Pod(name="claims", namespace="default"), None)
        assert [device.address for device in found] == [GPU, SOUND]
        with pytest.raises(DevicesUnknown, match=r"CDI device vendor\.com/gpu=z: no file in"):
            await devices.at_start(Pod(name="wrong", namespace="default"), None)


async def test_a_device_that_is_not_ready(world: World) -> None:
    world.sysfs.pci("0000:05:00.0", "20", driver="nvme")
    devices = world.devices(hot_plug_vfio="root-port", cold_plug_vfio="root-port")
    with pytest.raises(DeviceUnavailable, match=r"is bound to nvme"):
        devices.wanted_by(container("/dev/vfio/20"), privileged=False)
    with pytest.raises(DeviceUnavailable, match=r"is bound to nvme"):
        await devices.at_start(Pod(), bundle("/dev/vfio/20"))


async def test_confidential_guests_are_given_devices_by_their_own_files(world: World) -> None:
    world.sysfs.own_file(GPU, "vfio0")
    world.describe("vendor.com/gpu", group="/dev/vfio/12", own="/dev/vfio/devices/vfio0")
    devices = world.devices(cold_plug_vfio="root-port", confidential_guest=True)
    with pytest.raises(
        InvalidSpec, match=r"^/dev/vfio/12: a VFIO group cannot be given to a confidential guest"
    ):
        await devices.at_start(Pod(annotations={"cdi.k8s.io/x": "vendor.com/gpu=group"}), None)
    (found,) = await devices.at_start(Pod(annotations={"cdi.k8s.io/x": "vendor.com/gpu=own"}), None)
    assert found.own_file == Path("/dev/vfio/devices/vfio0")
    (told,) = await world.give(devices, "c1", x="vendor.com/gpu=own")
    assert (told.id, told.container_path) == ("vfio0", "/dev/vfio/devices/vfio0")


async def test_crypto_queues(world: World) -> None:
    world.sysfs.mediated(UUID, "41", "vfio-ap", queues="05.0004\n05.0005\n")
    for keys, kind in (
        ({"hot_plug_vfio": "root-port"}, "vfio-ap"),
        ({"cold_plug_vfio": "root-port"}, "vfio-ap-cold"),
    ):
        devices = world.devices(**keys)
        await devices.at_start(Pod(), bundle("/dev/vfio/41"))
        (told,) = await world.give(devices, "c1", "/dev/vfio/41")
        assert (told.type, list(told.options)) == (kind, ["05.0004", "05.0005"])


async def test_parts_of_a_device_are_told_by_its_address(world: World) -> None:
    world.sysfs.mediated(UUID, "40", "vfio-pci", parent=GPU)
    devices = world.devices(hot_plug_vfio="root-port")
    (told,) = await world.give(devices, "c1", "/dev/vfio/40")
    assert list(told.options) == [f"{GPU}=02/60"]


@pytest.mark.parametrize(
    ("mode", "kind", "left"),
    [
        ("guest-kernel", "vfio-pci-gk", ["/dev/fuse"]),
        ("vfio", "vfio-pci", ["/dev/fuse", "/dev/vfio/12", "/dev/vfio/13"]),
    ],
)
async def test_what_is_left_of_the_hosts_files(world: World, mode: str, kind: str, left: list[str]) -> None:
    """The agent puts the guest's in their place."""
    world.describe("vendor.com/nic", a="/dev/vfio/13")
    devices = world.devices(hot_plug_vfio="root-port", mode=mode)
    spec = container("/dev/vfio/vfio", "/dev/fuse", "/dev/vfio/12", "/dev/iommu", x="vendor.com/nic=a")
    wanted = devices.wanted_by(spec, privileged=False)
    devices.edit(spec, wanted)
    assert files_of(spec) == left
    assert {told.type for told in await devices.give("c1", wanted, world.qemu)} == {kind}

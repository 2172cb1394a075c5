"""Devices that come behind the ports for those of the host: a booted guest finds them, and its containers get them.

No machine of ours has an IOMMU, so the devices are QEMU's own: what the guest sees of one of the host's differs in
nothing that matters here. That QEMU is asked for one of the host's, and what is told of its refusal, is here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from hypervisor.errors import DeviceUnavailable, HotplugRefused
from hypervisor.qemu import commands
from hypervisor.qemu.bridge import Place
from hypervisor.qemu.ports import free_place
from hypervisor.vfio import HostDevice
from tests.vm.guest import MARKS, Guest, running_guest, specification
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = MARKS
HOST = "0000:3b:00.0"
# A device for exercises that no driver of the guest claims.
DRIVER = "edu"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    changed = {"host_device_places": 2, "iommu": True}
    folder = tmp_path_factory.mktemp("guest")
    async with running_guest(folder, "agent.hotplug_timeout=30", changed=changed) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(hostname="pod", sandbox_id="sb1"))
        yield running


async def plugged(guest: Guest, name: str) -> str:
    """Plug a device into the next free port, as the host's are; the answer is its path in the guest."""
    monitor = guest.machine.monitor
    place = free_place(guest.machine._spec, await commands.query_pci(monitor))
    assert place is not None
    slot = {"addr": hex(place.slot)} if place.slot else {}
    await commands.device_add(monitor, DRIVER, name, {"bus": place.bus, **slot})
    path = await guest.machine.pci_path(name)
    assert path is not None
    return path


async def created(guest: Guest, kind: str, path: str, script: str, *env: str) -> str:
    container_id = guest.new_id()
    request = pb.CreateContainerRequest(container_id=container_id, OCI=specification(("sh", "-c", script)))
    request.OCI.Process.Env.extend(env)
    request.devices.add(id="12", type=kind, container_path="/dev/vfio/12", options=[f"{HOST}={path}"])
    await guest.agent.create_container(request)
    return container_id


async def said(guest: Guest, container_id: str) -> list[str]:
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    text = await guest.output(container_id)
    errors = await guest.output(container_id, stderr=True)
    assert (await guest.wait(container_id), errors) == (0, b"")
    await guest.remove(container_id)
    return text.decode().split()


async def test_a_device_of_the_guests_kernel(guest: Guest) -> None:
    path = await plugged(guest, "one")
    assert path.endswith("/00")
    script = "ls /dev; echo $PCIDEVICE_X; cat /sys/bus/pci/devices/$PCIDEVICE_X/vendor"
    container_id = await created(guest, "vfio-pci-gk", path, script, f"PCIDEVICE_X={HOST}")
    *files, address, vendor = await said(guest, container_id)
    assert "vfio" not in files
    assert address != HOST
    assert vendor == "0x1234"
    await commands.unplug(guest.machine.monitor, "one")


async def test_a_device_of_the_containers_own_program(guest: Guest) -> None:
    """It is bound to the guest's VFIO, and the group's file opens in the container, and in no other."""
    path = await plugged(guest, "two")
    container_id = await created(guest, "vfio-pci", path, "for f in /dev/vfio/*; do echo $f; : < $f; done")
    group, control = await said(guest, container_id)
    assert control == "/dev/vfio/vfio"
    assert group.removeprefix("/dev/vfio/").isdecimal()
    _, other = await guest.result("sh", "-c", "ls /dev")
    assert "vfio" not in other.decode().split()
    await commands.unplug(guest.machine.monitor, "two")


async def test_ports_are_free_again(guest: Guest) -> None:
    monitor, spec = guest.machine.monitor, guest.machine._spec
    for name in ("three", "four"):
        await plugged(guest, name)
    assert free_place(spec, await commands.query_pci(monitor)) is None
    await commands.unplug(monitor, "three")
    assert free_place(spec, await commands.query_pci(monitor)) == Place("rp0")
    await commands.unplug(monitor, "four")


async def test_a_device_that_never_comes(guest: Guest) -> None:
    with pytest.raises(RpcError, match="is no path of a PCI device") as refused:
        await created(guest, "vfio-pci-gk", "x/y", "true")
    assert refused.value.code is Code.INVALID_ARGUMENT


async def test_qemu_is_asked_for_a_device_that_the_host_does_not_have(guest: Guest) -> None:
    device = HostDevice(kind="pci", address=HOST, group="12", vendor=0x10DE, device=0x2331)
    with pytest.raises(HotplugRefused) as refused:
        await guest.machine.plug_host_device(device)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(
        f"device {HOST} of the host (/dev/vfio/12) was not plugged in: QEMU refused device_add: vfio "
    )
    assert "no such host device" in line
    assert line.endswith(
        "; no other program may have it open, and all of its group has to be bound to vfio-pci; "
        "`kata-py check` looks"
    )
    assert free_place(guest.machine._spec, await commands.query_pci(guest.machine.monitor)) == Place("rp0")


async def test_a_machine_that_is_to_start_with_such_a_device(guest: Guest, tmp_path: Path) -> None:
    device = HostDevice(kind="pci", address=HOST, group="12", vendor=0x10DE, device=0x2331)
    changed = {"host_devices": (device,)}
    with pytest.raises(DeviceUnavailable) as refused:
        async with running_guest(tmp_path, changed=changed):
            pytest.fail("it started")
    (line,) = str(refused.value).splitlines()
    assert line.startswith(
        f"the virtual machine did not start: QEMU cannot open device {HOST} of the host (/dev/vfio/12): vfio "
    )
    assert "; no other program may have it open" in line


@pytest.mark.parametrize(("kind", "steps"), [("switch-port", 4), ("bridge-port", 2)])
async def test_ports_of_other_kinds(tmp_path: Path, kind: str, steps: int) -> None:
    """The second place of each: a switch adds two steps to the way, and a bridge has slots."""
    changed = {"host_device_places": 2, "host_device_port": kind}
    async with running_guest(tmp_path, "agent.hotplug_timeout=30", changed=changed) as guest:
        await guest.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb1"))
        for name in ("one", "two"):
            path = await plugged(guest, name)
        assert len(path.split("/")) == steps
        script = "cat /sys/bus/pci/devices/$PCIDEVICE_X/vendor"
        container_id = await created(guest, "vfio-pci-gk", path, script, f"PCIDEVICE_X={HOST}")
        assert await said(guest, container_id) == ["0x1234"]
        await commands.unplug(guest.machine.monitor, "two")

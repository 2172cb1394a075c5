"""What QEMU is told of an interface that is plugged into a running machine on channels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from hypervisor.qemu import nic as module
from hypervisor.qemu.nic import Interfaces, NicFds
from hypervisor.spec import Nic
from tests.unit.hypervisor.test_cmdline import spec
from tests.unit.hypervisor.test_disk import Qemu, monitor

if TYPE_CHECKING:
    from contextlib import ExitStack


@pytest.mark.parametrize("bounces", [False, True])
async def test_a_protected_guest_gets_copies(monkeypatch: pytest.MonkeyPatch, bounces: bool) -> None:
    def opened(nic: Nic, undo: ExitStack) -> NicFds:
        fd = os.open("/dev/null", os.O_RDWR)
        undo.callback(os.close, fd)
        return NicFds((fd,))

    monkeypatch.setattr(module, "opened", opened)
    qemu = Qemu()
    interfaces = Interfaces(spec(arch="s390x", nic_ports=1, iommu_platform=bounces))
    await interfaces.plug(monitor(qemu), Nic(id="nic0", mac="02:00:00:00:00:01", tap="tap0"))
    (told,) = [arguments for name, arguments in qemu.said if name == "device_add"]
    assert told["driver"] == "virtio-net-ccw"
    assert told.get("iommu_platform") == (True if bounces else None)

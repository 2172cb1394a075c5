"""A disk and a network card come and go while a real QEMU runs our guest, and nothing of them is left.

Memory is in `test_resize`: modules stay, because a guest that uses one does not let go of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HotplugRefused, QmpRefused
from hypervisor.host import Host
from hypervisor.netns import entered, new_netns
from hypervisor.qemu import commands
from hypervisor.qemu.machine import booted
from hypervisor.tap import open_tap
from tests.vm.test_machine import GUEST, READY_VPORT, make_spec, tiny_kernel
from tests.vm.test_machine import pytestmark as vm_marks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import VmSpec

__all__ = ["make_spec"]

pytestmark = [
    *vm_marks,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not (GUEST / "initrd.img").exists(), reason="no guest image in build/guest"),
]
ROUNDS = 20
MIB = 1 << 20


async def inventory(monitor: Monitor, pid: int) -> dict[str, Any]:
    """All that plugging could leave behind, QEMU's open files among it."""
    return {
        "pci": await commands.query_pci(monitor),
        "cpus": await commands.query_hotpluggable_cpus(monitor),
        "threads": [cpu.cpu_index for cpu in await commands.query_cpus_fast(monitor)],
        "memory": await commands.query_memory_devices(monitor),
        "fdsets": await commands.query_fdsets(monitor),
        "objects": await monitor.execute("qom-list", {"path": "/objects"}),
        "nodes": await monitor.execute("query-named-block-nodes", {"flat": True}),
        "chardevs": await monitor.execute("query-chardev"),
        "files": sorted(
            name for name in map(os.readlink, _fds(pid)) if name.startswith("/") and "net/tun" not in name
        ),
        "taps": sum("net/tun" in os.readlink(path) for path in _fds(pid)),
    }


def _fds(pid: int) -> list[str]:
    return [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]


async def disk(monitor: Monitor, folder: Path) -> None:
    image = folder / "disk"
    image.touch()
    os.truncate(image, MIB)
    with image.open("r+b") as opened:
        fdset = await commands.add_fd(monitor, opened.fileno(), "disk")
    assert [entry.fdset_id for entry in await commands.query_fdsets(monitor)] == [fdset]
    file = {"driver": "file", "filename": f"/dev/fdset/{fdset}"}
    await commands.blockdev_add(monitor, "raw", "drive-1", {"file": file})
    await commands.device_add(monitor, "virtio-blk-pci", "disk1", {"drive": "drive-1", "bus": "rp0"})
    path = commands.pci_path(await commands.query_pci(monitor), "disk1")
    assert path is not None
    assert path.endswith("/00")
    assert await commands.qom_get(monitor, "disk1", "addr") == 0
    await commands.unplug(monitor, "disk1")
    await commands.blockdev_del(monitor, "drive-1")
    await commands.remove_fd(monitor, fdset)


async def nic(monitor: Monitor, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes taps")
    with contextlib.ExitStack() as undo:
        netns = new_netns()  # the tap keeps it
        undo.callback(os.close, netns)
        with entered(Path(f"/proc/self/fd/{netns}")):
            (fd,) = open_tap("tap0", 1, undo)
        await commands.getfd(monitor, "fd0", fd)
    await commands.netdev_add_tap(monitor, "network-tap0", ["fd0"])
    properties = {"netdev": "network-tap0", "mac": "02:00:00:00:00:01", "bus": "rp1", "romfile": ""}
    await commands.device_add(monitor, "virtio-net-pci", "nic1", properties)
    await commands.unplug(monitor, "nic1")
    await commands.netdev_del(monitor, "network-tap0")


async def test_what_comes_and_goes_leaves_nothing(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_connection(sock: Any) -> None:
        sock.close()
        ready.set_result(None)

    spec = make_spec(
        kernel=GUEST / "vmlinux",
        initrd=GUEST / "initrd.img",
        memory_mib=256,
        pcie_root_ports=2,
        vsock="user",
        tsc_khz=Host().tsc_khz(),
        ready_vport=READY_VPORT,
    )
    kinds: list[Callable[[Monitor, Path], Awaitable[None]]] = [disk, nic]
    async with booted(spec, listeners={READY_VPORT: on_connection}) as machine:
        ends: list[asyncio.Future[Any]] = [ready, machine.exited]
        await asyncio.wait(ends, timeout=80, return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), machine.failure("the guest did not come up")
        before = await inventory(machine.monitor, machine.pid)
        for _ in range(ROUNDS):
            for plug_and_unplug in kinds:
                await plug_and_unplug(machine.monitor, tmp_path)
                # QEMU closes files when all of its threads have let go of them.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(60):
                        while await inventory(machine.monitor, machine.pid) != before:
                            await asyncio.sleep(0.05)
                assert await inventory(machine.monitor, machine.pid) == before, plug_and_unplug
        await commands.unplug(machine.monitor, "disk1")  # gone already: nothing happens
        with pytest.raises(QmpRefused, match="device_add"):
            await commands.device_add(
                machine.monitor, "virtio-blk-pci", "disk1", {"drive": "none", "bus": "rp0"}
            )
        assert await inventory(machine.monitor, machine.pid) == before


async def test_a_guest_that_does_not_let_go_is_told(make_spec: Callable[..., VmSpec]) -> None:
    """This one has no kernel that could."""
    async with booted(make_spec(tiny_kernel(b"deaf\n"), pcie_root_ports=1)) as machine:
        await commands.device_add(machine.monitor, "virtio-rng-pci", "rng1", {"bus": "rp0"})
        with pytest.raises(HotplugRefused, match=r"rng1: the guest did not let go of it within 0\.5 s; stop"):
            await commands.unplug(machine.monitor, "rng1", timeout_s=0.5)

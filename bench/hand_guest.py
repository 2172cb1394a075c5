"""A guest driven by hand: the product's kernel, machine and devices, but in it only a shell, and no container.

The base of what a container reaches through its guest. QEMU gets the product's arguments, and behind them what the
product plugs in by itself: a tap that `ip` has made, and a disk. The guest's init is a script in a second archive
behind the product's initrd; the programs are those of the container's image. Whoever has a script for the guest waits
for its call: the guest connects to the host again and again, and each connection is a shell.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench import cables, floor
from bench.errors import BenchError
from bench.lab import LIMIT_S
from config import load
from guest_agent.modules import BOOT
from guest_image.cpio import Tree
from hypervisor.arch import arch_named
from hypervisor.netns import entered
from hypervisor.qemu.disk_places import places
from shim.network import NIC_PORTS
from shim.plan import plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from bench.cables import Cables
    from hypervisor.spec import VmSpec

#: Where the guest has its shared directory, its disk, and the programs that it is given.
SHARED, DISK, TOOLS = "/shared", "/dev/vda", "/tools"
_PORT = 5000
_BLOCK = 64 << 10
_VHOST_NET = Path("/dev/vhost-net")
_INIT = f"""\
#!/hand/busybox sh
/hand/busybox mkdir -p /proc /sys /dev /hand/bin {SHARED}
/hand/busybox --install -s /hand/bin
export PATH=/hand/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
while read module; do insmod $module; done < /hand/modules
mount -t virtiofs {{tag}} {SHARED}
ip link set lo up
ip address add {cables.HAND}/24 dev eth0
ip link set eth0 up
while :; do nc {cables.TO_HAND} {_PORT} -e /hand/bin/sh; done
"""


class HandGuest:
    """The running guest. `exported` is the host's side of SHARED."""

    def __init__(self, machine: floor.Machine, listener: socket.socket, exported: Path) -> None:
        self.exported = exported
        self._machine = machine
        self._listener = listener

    async def run(self, script: str) -> str:
        """What the script has printed, errors included. Raises BenchError."""
        try:
            async with asyncio.timeout(LIMIT_S):
                return await floor.unless_ended(self._machine, asyncio.create_task(self._call(script)))
        except TimeoutError as err:
            self._machine.console.drain()
            last = (self._machine.console.tail() or ["nothing"])[-1]
            raise BenchError(
                f"no answer of the guest by hand within {LIMIT_S:.0f} s; its console: {last}"
            ) from err

    async def _call(self, script: str) -> str:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        with connection:
            # The shell has read all of it before it does the first of it: nothing reads the rest in its place.
            await loop.sock_sendall(connection, f"{{ {script}\n}} </dev/null\n".encode())
            connection.shutdown(socket.SHUT_WR)
            said = bytearray()
            while data := await loop.sock_recv(connection, _BLOCK):
                said += data
        return said.decode(errors="replace")


@asynccontextmanager
async def hand_guest(
    config: Path, folder: Path, there: Cables, *, tools: Path | None = None, disk: str = ""
) -> AsyncIterator[HandGuest]:
    """The guest for the length of the block, up when its first answer comes. `tools` is copied into it; `disk` is a
    block device of the host.

    Raises BenchError, ConfigError, HypervisorError.
    """
    exported = folder / "shared"
    exported.mkdir(parents=True)
    spec = _vm_spec(config, folder, exported, there, tools, disk=bool(disk))
    async with AsyncExitStack() as undo:
        with entered(there.world):
            listener = undo.enter_context(socket.create_server((cables.TO_HAND, _PORT)))
        listener.setblocking(False)
        more = [*_interface_words(spec), *(_disk_words(spec, disk) if disk else ())]
        yield HandGuest(await floor.start(spec, undo, more), listener, exported)


def _vm_spec(
    config: Path, folder: Path, exported: Path, there: Cables, tools: Path | None, *, disk: bool
) -> VmSpec:
    spec = plan(load(config).config, "hand", exported=exported)
    if spec.initrd is None or not spec.shares:
        raise BenchError("a guest by hand needs a configuration with an initrd and a shared directory")
    archive = spec.initrd.read_bytes()
    names = [*BOOT, "virtio_net", "virtiofs", *(["virtio_blk"] if disk else [])]
    tree = Tree()
    tree.file("/hand/init", _INIT.format(tag=spec.shares[0].tag).encode(), mode=0o755)
    tree.file("/hand/busybox", _busybox().read_bytes(), mode=0o755)
    tree.file("/hand/modules", "".join(f"{path}\n" for path in floor.modules(archive, names)).encode())
    for tool in sorted(tools.iterdir()) if tools else ():
        tree.file(f"{TOOLS}/{tool.name}", tool.read_bytes(), mode=0o755)
    initrd = folder / "initrd.img"
    initrd.write_bytes(archive + tree.to_cpio())
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o700)
    return dataclasses.replace(
        spec,
        run_dir=run_dir,
        initrd=initrd,
        kernel_params=f"{spec.kernel_params} rdinit=/hand/init".strip(),
        nic_ports=NIC_PORTS,
        netns=there.hand,
    )


def _busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise BenchError("a guest by hand needs busybox: apt-get install busybox-static")
    return Path(found)


def _interface_words(spec: VmSpec) -> list[str]:
    """An interface behind the tap that `bench.cables` has made."""
    vhost = "on" if os.access(_VHOST_NET, os.R_OK | os.W_OK) else "off"
    driver = arch_named(spec.arch).devices.net
    return [
        *("-netdev", f"tap,id=hand-tap,ifname={cables.TAP},script=no,downscript=no,vhost={vhost}"),
        *("-device", f"{driver},id=hand-nic,netdev=hand-tap,mac={cables.HAND_MAC},bus=nic-port0,romfile="),
    ]


def _disk_words(spec: VmSpec, device: str) -> list[str]:
    """A disk at the place where the product's first one is plugged in, with the configuration's settings."""
    arch = arch_named(spec.arch)
    place = places(arch)[0]
    backend = {
        "aio": spec.disk_aio,
        "cache.direct": _switch(spec.disk_cache_direct),
        "cache.no-flush": _switch(spec.disk_cache_no_flush),
    }
    front = {"queue-size": spec.disk_queue_size, "num-queues": spec.disk_queues}
    where = f"bus={place.bus},addr={place.slot:02x},disable-legacy=on"
    return [
        *("-blockdev", f"driver=host_device,node-name=hand-disk,filename={device}{_joined(backend)}"),
        *("-device", f"{arch.devices.block},id=hand-blk,drive=hand-disk,{where}{_joined(front)}"),
    ]


def _switch(value: bool | None) -> str | None:
    return None if value is None else "on" if value else "off"


def _joined(words: Mapping[str, str | int | None]) -> str:
    return "".join(f",{name}={value}" for name, value in words.items() if value is not None)

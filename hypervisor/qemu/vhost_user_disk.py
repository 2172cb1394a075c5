"""A disk that another program of the host serves (SPDK, QEMU's storage daemon): vhost-user over a Unix socket.

The guest's requests go past QEMU, which introduces the two to each other. The program maps the guest's memory for that,
so the memory has to be shared.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from itertools import count
from typing import TYPE_CHECKING

from hypervisor.errors import HotplugRefused, HypervisorError, QmpRefused
from hypervisor.qemu import commands

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import VhostUserDisk

DRIVER = "vhost-user-blk-pci"
# QEMU lets go of the socket some moments after it has told that the disk is gone; no event tells of it.
_LETTING_GO_S = 5.0
_LETTING_GO_PAUSE_S = 0.02
# The beginning of every conversation (QEMU: interop/vhost-user, "Message Specification"): request, flags, size of what
# follows, which is 64 bits of features in the answer.
_HEADER = struct.Struct("=III")
_GET_FEATURES, _VERSION, _IS_REPLY, _FEATURES_BYTES = 1, 0x1, 0x4, 8
_ANSWER_BYTES = _HEADER.size + _FEATURES_BYTES
_ANSWER_S = 5.0


async def add(
    monitor: Monitor, disk: VhostUserDisk, properties: Mapping[str, object], *, reconnect_s: int
) -> None:
    """Connect QEMU to the program and plug the disk in where `properties` say.

    Raises HotplugRefused, QmpError; when it does, nothing is left.
    """
    chardev = _chardev(disk.id)
    await _see_that_it_is_served(disk)
    try:
        await commands.chardev_add_socket(monitor, chardev, disk.socket, reconnect_s=reconnect_s)
    except QmpRefused as err:
        raise HotplugRefused(
            f"cannot plug in disk {disk.id}: {err}; start the program that serves {disk.socket}"
        ) from err
    try:
        await commands.device_add(monitor, DRIVER, disk.id, {**properties, "chardev": chardev})
    except HypervisorError as err:
        await _disconnect(monitor, disk.id)
        if isinstance(err, QmpRefused):
            raise HotplugRefused(
                f"cannot plug in disk {disk.id}: {err}; see that {disk.socket} is served as vhost-user-blk, with as "
                "many queues as num_queues"
            ) from err
        raise


async def remove(monitor: Monitor, disk_id: str) -> None:
    """Take the disk away and break the connection. Raises HotplugRefused, QmpError."""
    await commands.unplug(monitor, disk_id)
    await _disconnect(monitor, disk_id)


async def _disconnect(monitor: Monitor, disk_id: str) -> None:
    for attempt in count():
        try:
            await commands.chardev_remove(monitor, _chardev(disk_id))
            return
        except QmpRefused as err:
            if attempt * _LETTING_GO_PAUSE_S >= _LETTING_GO_S:
                raise HotplugRefused(
                    f"disk {disk_id} is unplugged, and QEMU keeps its connection: {err}"
                ) from err
            await asyncio.sleep(_LETTING_GO_PAUSE_S)


async def _see_that_it_is_served(disk: VhostUserDisk) -> None:
    """Ask the program what it is able to do, as QEMU will. QEMU waits for the answer, and with everything it does: a
    program that accepts connections and says nothing would stop the whole machine. Raises HotplugRefused.
    """
    why = "it does not speak vhost-user"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_ANSWER_S):
                await loop.sock_connect(probe, str(disk.socket))
                await loop.sock_sendall(probe, _HEADER.pack(_GET_FEATURES, _VERSION, 0))
                answer = b""
                while len(answer) < _ANSWER_BYTES and (more := await loop.sock_recv(probe, _ANSWER_BYTES)):
                    answer += more
            if len(answer) >= _HEADER.size:
                request, flags, size = _HEADER.unpack_from(answer)
                if (request, flags & _IS_REPLY, size) == (_GET_FEATURES, _IS_REPLY, _FEATURES_BYTES):
                    return
        except TimeoutError:
            why = f"no answer within {_ANSWER_S:g} s"
        except OSError as err:
            why = err.strerror or str(err)
    raise HotplugRefused(
        f"cannot plug in disk {disk.id}: {disk.socket}: {why}; start the program that serves it as vhost-user-blk"
    )


def _chardev(disk_id: str) -> str:
    return f"{disk_id}-socket"

"""QEMU's commands that only some machines need, typed: one function each, named as QEMU names them.

Each takes the monitor first, and raises QmpRefused and QmpUnavailable as the monitor does; an answer of another
shape than QEMU documents is a QmpUnavailable too. Ids are ours; sizes are in bytes because QEMU's are.
Descriptors stay open here: QEMU gets copies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec

from hypervisor.errors import HotplugRefused, QmpRefused, QmpUnavailable
from hypervisor.qemu.events import AcpiDeviceOst, Bytes, DeviceDeleted, DeviceUnplugFailed, Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from hypervisor.qemu.events import Event
    from hypervisor.qemu.qmp import Monitor

    Properties: TypeAlias = Mapping[str, object]

T = TypeVar("T")

# A guest lets go of a device within a second, also when emulated; one that has no driver for it never does.
UNPLUG_TIMEOUT_S = 10.0
Count = Annotated[int, msgspec.Meta(ge=0)]
# ACPI 6.5, tables 6-11 and 6-13: what a status is about (the request to let go, and doing it), and the statuses that
# mean it will not be done: it failed, is not supported, the device or what depends on it is in use.
_EJECTIONS, _EJECTION_FAILED = (0x3, 0x103), (0x1, 0x2, 0x80, 0x81, 0x82, 0x83)


class _Answer(msgspec.Struct, frozen=True, rename="kebab"):
    """(Part of) an answer. Members that nobody here has a use for are left out."""


class FdSet(_Answer, frozen=True):
    """A set of descriptors, which QEMU opens as `/dev/fdset/<fdset_id>`; each has a word of ours."""

    class Fd(_Answer, frozen=True):
        fd: Count
        opaque: Text = ""

    fdset_id: Count
    fds: tuple[Fd, ...]


class HotpluggableCpu(_Answer, frozen=True):
    """A place for a virtual processor: taken when it has a `qom_path`; `props` are what device_add wants for it."""

    type: Text
    vcpus_count: Count
    props: dict[str, int]
    qom_path: Text | None = None


class Cpu(_Answer, frozen=True):
    """A virtual processor and the thread of QEMU that runs it."""

    cpu_index: Count
    thread_id: Count
    qom_path: Text


class MemoryDevice(_Answer, frozen=True):
    """Memory beside what the guest booted with."""

    class Data(_Answer, frozen=True):
        size: Bytes
        id: Text | None = None
        hotplugged: bool = False
        hotpluggable: bool = False
        requested_size: Bytes | None = None
        """Of virtio-mem: what it shall have; `size` is what it has."""

    type: Text
    data: Data


class PciDevice(msgspec.Struct, frozen=True):
    """A device on a PCI bus. Behind a bridge there are more."""

    class Bridge(msgspec.Struct, frozen=True):
        devices: tuple[PciDevice, ...] = ()

    slot: Count
    function: Count
    qdev_id: Text
    pci_bridge: Bridge | None = None


class PciBus(msgspec.Struct, frozen=True):
    """A root bus."""

    bus: int
    devices: tuple[PciDevice, ...]


class Migration(_Answer, frozen=True):
    """How far a migration has come; QEMU tells no status before the first one."""

    status: Text = "none"
    error_desc: Text = ""


class Machine(_Answer, frozen=True):
    """A type of machine, and its short name where it has one."""

    name: Text
    alias: Text | None = None


class _Name(msgspec.Struct, frozen=True):
    name: Text


class _AddedFd(_Answer, frozen=True):
    fdset_id: Count


class _Balloon(msgspec.Struct, frozen=True):
    actual: Bytes


# Descriptors


async def getfd(monitor: Monitor, fdname: str, fd: int) -> None:
    """Give QEMU a descriptor under a name, for a command that takes names: `netdev_add`."""
    await monitor.execute("getfd", {"fdname": fdname}, fd=fd)


async def closefd(monitor: Monitor, fdname: str) -> None:
    """Take back a descriptor that no command took."""
    await monitor.execute("closefd", {"fdname": fdname})


async def add_fd(monitor: Monitor, fd: int, opaque: str) -> int:
    """Put a descriptor into a new set; the answer is the set's number."""
    reply = await monitor.execute("add-fd", {"opaque": opaque}, fd=fd)
    return _decoded("add-fd", reply, _AddedFd).fdset_id


async def remove_fd(monitor: Monitor, fdset_id: int) -> None:
    """Let QEMU close a set of descriptors, as soon as nothing has it open."""
    await monitor.execute("remove-fd", {"fdset-id": fdset_id})


async def query_fdsets(monitor: Monitor) -> tuple[FdSet, ...]:
    return await _asked(monitor, "query-fdsets", tuple[FdSet, ...])


# Devices, and what is behind them


async def device_add(monitor: Monitor, driver: str, device_id: str, properties: Properties) -> None:
    """Plug a device in."""
    await monitor.execute("device_add", {"driver": driver, "id": device_id, **properties})


async def device_del(monitor: Monitor, device_id: str) -> None:
    """Ask the guest to let go of a device; it is gone when DeviceDeleted says so. See `unplug`."""
    await monitor.execute("device_del", {"id": device_id})


async def told(monitor: Monitor, outcome: asyncio.Future[Any], *, timeout_s: float) -> bool:
    """Wait until a listener to events knows the outcome, but no longer than the time, or than QEMU's monitor is there.
    Returns whether that has gone away: no event comes any more."""
    lost = asyncio.create_task(monitor.lost())
    try:
        ends: list[asyncio.Future[Any]] = [outcome, lost]
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return lost.done()
    finally:
        lost.cancel()


async def unplug(monitor: Monitor, device_id: str, *, timeout_s: float = UNPLUG_TIMEOUT_S) -> None:
    """Take a device out, and wait until the guest has let go of it. Nothing happens when it is not there.

    Raises HotplugRefused when the guest does not let go of it within the time, or says so at once.
    """
    outcome: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def heard(event: Event) -> None:
        if isinstance(event, AcpiDeviceOst):
            info = event.info
            ours = info.device == device_id and info.source in _EJECTIONS and info.status in _EJECTION_FAILED
        else:
            ours = isinstance(event, DeviceDeleted | DeviceUnplugFailed) and event.device == device_id
        if ours and not outcome.done():
            outcome.set_result(event)

    with monitor.listening(heard):
        try:
            await device_del(monitor, device_id)
        except QmpRefused as err:
            if err.kind == "DeviceNotFound":
                return
            raise HotplugRefused(f"cannot unplug {device_id}: {err}; try again later") from err
        lost = await told(monitor, outcome, timeout_s=timeout_s)
    if outcome.done():
        if not isinstance(outcome.result(), DeviceDeleted):
            raise HotplugRefused(f"cannot unplug {device_id}: the guest refused; stop what uses it there")
    elif lost:
        raise QmpUnavailable(f"QEMU's monitor went away while {device_id} was being unplugged")
    else:
        raise HotplugRefused(
            f"cannot unplug {device_id}: the guest did not let go of it within {timeout_s:g} s; "
            "stop what uses it there"
        )


async def object_add(monitor: Monitor, qom_type: str, object_id: str, properties: Properties) -> None:
    """Make an object: memory, a thread, a secret."""
    await monitor.execute("object-add", {"qom-type": qom_type, "id": object_id, **properties})


async def object_del(monitor: Monitor, object_id: str) -> None:
    await monitor.execute("object-del", {"id": object_id})


async def blockdev_add(monitor: Monitor, driver: str, node_name: str, properties: Properties) -> None:
    """Open what a disk reads and writes."""
    await monitor.execute("blockdev-add", {"driver": driver, "node-name": node_name, **properties})


async def blockdev_del(monitor: Monitor, node_name: str) -> None:
    await monitor.execute("blockdev-del", {"node-name": node_name})


async def block_bytes(monitor: Monitor, node_name: str) -> int | None:
    """How large what is behind a node is for the guest; None when there is no such node."""
    nodes: Any = await monitor.execute("query-named-block-nodes", {"flat": True})
    return next((node["image"]["virtual-size"] for node in nodes if node.get("node-name") == node_name), None)


async def block_resize(monitor: Monitor, node_name: str, size_bytes: int) -> None:
    await monitor.execute("block_resize", {"node-name": node_name, "size": size_bytes})


async def netdev_add_tap(
    monitor: Monitor, netdev_id: str, fdnames: Sequence[str], vhost_fdnames: Sequence[str] = ()
) -> None:
    """Make a network's host end out of descriptors that `getfd` has given: one for each queue."""
    # The separator is QEMU's; with commas, which Kata's runtime writes, more than one queue is refused.
    words: dict[str, object] = {"type": "tap", "id": netdev_id, "fds": ":".join(fdnames)}
    if vhost_fdnames:
        words |= {"vhost": True, "vhostfds": ":".join(vhost_fdnames)}
    await monitor.execute("netdev_add", words)


async def netdev_del(monitor: Monitor, netdev_id: str) -> None:
    await monitor.execute("netdev_del", {"id": netdev_id})


async def chardev_add_socket(monitor: Monitor, chardev_id: str, path: Path, *, reconnect_s: int = 0) -> None:
    """Connect to a Unix socket, for a vhost-user device; with 0 a broken connection stays broken."""
    address = {"type": "unix", "data": {"path": str(path)}}
    data = {"addr": address, "server": False, **reconnecting(monitor.version, reconnect_s)}
    await monitor.execute("chardev-add", {"id": chardev_id, "backend": {"type": "socket", "data": data}})


def reconnecting(version: tuple[int, ...], pause_s: int) -> dict[str, int]:
    """The member that says when to connect again: QEMU 9.2 has it in milliseconds, QEMU 11 no longer in seconds."""
    if pause_s == 0:
        return {}
    return {"reconnect-ms": 1000 * pause_s} if version >= (9, 2) else {"reconnect": pause_s}


async def chardev_remove(monitor: Monitor, chardev_id: str) -> None:
    await monitor.execute("chardev-remove", {"id": chardev_id})


async def query_pci(monitor: Monitor) -> tuple[PciBus, ...]:
    return await _asked(monitor, "query-pci", tuple[PciBus, ...])


def pci_path(buses: Sequence[PciBus], device_id: str) -> str | None:
    """Where the guest finds a device: the slots from the root to it, as Kata's agent takes them: `02/00`."""
    for bus in buses:
        for device, path in _below(bus.devices, ()):
            if device.qdev_id == device_id:
                return "/".join(f"{slot:02x}" for slot in path)
    return None


def _below(
    devices: Sequence[PciDevice], above: tuple[int, ...]
) -> Iterator[tuple[PciDevice, tuple[int, ...]]]:
    for device in devices:
        path = (*above, device.slot)
        yield device, path
        if device.pci_bridge is not None:
            yield from _below(device.pci_bridge.devices, path)


# Processors and memory


async def query_hotpluggable_cpus(monitor: Monitor) -> tuple[HotpluggableCpu, ...]:
    return await _asked(monitor, "query-hotpluggable-cpus", tuple[HotpluggableCpu, ...])


async def query_cpus_fast(monitor: Monitor) -> tuple[Cpu, ...]:
    return await _asked(monitor, "query-cpus-fast", tuple[Cpu, ...])


async def query_memory_devices(monitor: Monitor) -> tuple[MemoryDevice, ...]:
    return await _asked(monitor, "query-memory-devices", tuple[MemoryDevice, ...])


async def balloon(monitor: Monitor, size_bytes: int) -> None:
    """Ask the guest to make do with this much memory; BalloonChanged tells what it gave."""
    await monitor.execute("balloon", {"value": size_bytes})


async def query_balloon(monitor: Monitor) -> int:
    """Bytes that the balloon leaves the guest with."""
    return (await _asked(monitor, "query-balloon", _Balloon)).actual


# Migration and dumps


async def migrate_set_capabilities(monitor: Monitor, capabilities: Mapping[str, bool]) -> None:
    words = [{"capability": name, "state": state} for name, state in capabilities.items()]
    await monitor.execute("migrate-set-capabilities", {"capabilities": words})


async def migrate(monitor: Monitor, uri: str) -> None:
    """Begin to send the machine away; `query_migrate` tells how it goes."""
    await monitor.execute("migrate", {"uri": uri})


async def migrate_incoming(monitor: Monitor, uri: str) -> None:
    """Let a machine that was started with `-incoming defer` take its state from there."""
    await monitor.execute("migrate-incoming", {"uri": uri})


async def query_migrate(monitor: Monitor) -> Migration:
    return await _asked(monitor, "query-migrate", Migration)


async def dump_guest_memory(monitor: Monitor, fdname: str, *, paging: bool) -> None:
    """Begin to write the guest's memory, as ELF, to a file that `getfd` has given; DumpCompleted tells the end.
    `paging` keeps the guest's virtual addresses.
    """
    words = {"protocol": f"fd:{fdname}", "paging": paging, "format": "elf", "detach": True}
    await monitor.execute("dump-guest-memory", words)


# QEMU itself


async def qom_get(monitor: Monitor, path: str, name: str) -> object:
    """A property of any object; its type is the property's."""
    return await monitor.execute("qom-get", {"path": path, "property": name})


async def qom_set(monitor: Monitor, path: str, name: str, value: object) -> None:
    await monitor.execute("qom-set", {"path": path, "property": name, "value": value})


async def qom_list_types(monitor: Monitor) -> frozenset[str]:
    """Every type of object and device that this QEMU has."""
    names = await _asked(monitor, "qom-list-types", tuple[_Name, ...])
    return frozenset(entry.name for entry in names)


async def device_list_properties(monitor: Monitor, typename: str) -> frozenset[str]:
    """The names of the properties that a type of devices has."""
    reply = await monitor.execute("device-list-properties", {"typename": typename})
    return frozenset(entry.name for entry in _decoded("device-list-properties", reply, tuple[_Name, ...]))


async def query_machines(monitor: Monitor) -> tuple[Machine, ...]:
    return await _asked(monitor, "query-machines", tuple[Machine, ...])


async def _asked(monitor: Monitor, command: str, kind: type[T]) -> T:
    return _decoded(command, await monitor.execute(command), kind)


def _decoded(command: str, reply: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(reply, kind)
    except msgspec.ValidationError as err:
        raise QmpUnavailable(f"QEMU answered {command} with something else than it should: {err}") from err

"""What QEMU tells on its own, as far as somebody here acts on it or wants to read it: one type for each event.

QEMU runs an untrusted guest, so what it says is decoded strictly: an event with other members than it should
have is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

# QEMU's own names, ids and paths are far shorter.
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Event(msgspec.Struct, frozen=True, rename="kebab"):
    """One event; fields are named as QEMU names its data."""


class Shutdown(_Event, frozen=True):
    """The machine is shutting down. `guest` says whether it was the guest's wish."""

    reason: Text
    guest: bool


class GuestPanicked(_Event, frozen=True):
    """The guest's kernel gave up; `action` is what QEMU does about it: "pause", "poweroff" or "run"."""

    action: Text


class DeviceDeleted(_Event, frozen=True):
    """The guest let go of a device, and it is gone; `device` is empty for one without an id."""

    path: Text
    device: Text = ""


class DeviceUnplugFailed(_Event, frozen=True):
    """The guest refused to let go of a device."""

    path: Text
    device: Text = ""


class MemorySizeChanged(_Event, frozen=True):
    """A memory device (virtio-mem) has another size now."""

    size: Bytes
    qom_path: Text
    id: Text = ""


class BalloonChanged(_Event, frozen=True):
    """The balloon left the guest with another amount of memory."""

    actual: Bytes


class Ost(msgspec.Struct, frozen=True, rename="kebab"):
    """What the guest says about a slot (ACPI's _OST): `source` is what it was told, `status` 0 that it has done it."""

    source: Annotated[int, msgspec.Meta(ge=0)]
    status: Annotated[int, msgspec.Meta(ge=0)]
    device: Text = ""


class AcpiDeviceOst(_Event, frozen=True):
    """The guest has, or has not, taken a processor or a memory module, or let go of it."""

    info: Ost


class DumpResult(msgspec.Struct, frozen=True):
    """How far a dump has come: "active", "completed" or "failed"."""

    status: Text
    completed: Bytes
    total: Bytes


class DumpCompleted(_Event, frozen=True):
    """A dump of the guest's memory has ended, with an error or without."""

    result: DumpResult
    error: Text = ""


Event: TypeAlias = (
    Shutdown
    | GuestPanicked
    | DeviceDeleted
    | DeviceUnplugFailed
    | MemorySizeChanged
    | BalloonChanged
    | AcpiDeviceOst
    | DumpCompleted
)
_TYPES: Mapping[str, type[Event]] = {
    "SHUTDOWN": Shutdown,
    "GUEST_PANICKED": GuestPanicked,
    "DEVICE_DELETED": DeviceDeleted,
    "DEVICE_UNPLUG_GUEST_ERROR": DeviceUnplugFailed,
    "MEMORY_DEVICE_SIZE_CHANGE": MemorySizeChanged,
    "BALLOON_CHANGE": BalloonChanged,
    "ACPI_DEVICE_OST": AcpiDeviceOst,
    "DUMP_COMPLETED": DumpCompleted,
}


def event_from(name: str, data: Mapping[str, object]) -> Event | None:
    """The event; None for those that nobody here knows, and for what cannot be one."""
    kind = _TYPES.get(name)
    try:
        return None if kind is None else msgspec.convert(data, kind)
    except msgspec.ValidationError:
        return None

"""Events of QEMU as types: those that are known, and what is not one of them although it looks like one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.qemu.events import (
    AcpiDeviceOst,
    BalloonChanged,
    DeviceDeleted,
    DeviceUnplugFailed,
    DumpCompleted,
    DumpResult,
    GuestPanicked,
    MemorySizeChanged,
    Ost,
    Shutdown,
    event_from,
)

if TYPE_CHECKING:
    from hypervisor.qemu.events import Event

KNOWN: list[tuple[str, dict[str, Any], Event]] = [
    ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, Shutdown(reason="host-qmp-quit", guest=False)),
    (
        "GUEST_PANICKED",
        {"action": "pause", "info": {"type": "s390", "core": 0, "psw-mask": 1 << 63}},
        GuestPanicked(action="pause"),
    ),
    ("DEVICE_DELETED", {"device": "disk1", "path": "/m"}, DeviceDeleted(path="/m", device="disk1")),
    ("DEVICE_DELETED", {"path": "/m/x"}, DeviceDeleted(path="/m/x")),
    (
        "ACPI_DEVICE_OST",
        {"info": {"device": "d", "source": 1, "status": 0, "slot": "0", "slot-type": "DIMM"}},
        AcpiDeviceOst(Ost(1, 0, "d")),
    ),
    ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "dimm1", "path": "/m"}, DeviceUnplugFailed("/m", "dimm1")),
    (
        "MEMORY_DEVICE_SIZE_CHANGE",
        {"id": "vm0", "size": 1 << 30, "qom-path": "/machine/peripheral/vm0"},
        MemorySizeChanged(size=1 << 30, qom_path="/machine/peripheral/vm0", id="vm0"),
    ),
    ("BALLOON_CHANGE", {"actual": 123}, BalloonChanged(actual=123)),
    (
        "DUMP_COMPLETED",
        {"result": {"status": "failed", "completed": 0, "total": 5}, "error": "disk full"},
        DumpCompleted(DumpResult(status="failed", completed=0, total=5), "disk full"),
    ),
]


@pytest.mark.parametrize(("name", "data", "event"), KNOWN)
def test_events_have_types(name: str, data: dict[str, Any], event: Event) -> None:
    assert event_from(name, data) == event


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("RESUME", {}),
        ("shutdown", {"guest": True, "reason": "x"}),
        ("SHUTDOWN", {}),
        ("SHUTDOWN", {"guest": "yes", "reason": "x"}),
        ("SHUTDOWN", {"guest": True, "reason": "x" * 2000}),
        ("DEVICE_DELETED", {"device": 7, "path": "/m"}),
        ("BALLOON_CHANGE", {"actual": -1}),
        ("BALLOON_CHANGE", {"actual": 1 << 80}),
        ("DUMP_COMPLETED", {"result": None}),
    ],
)
def test_what_is_none(name: str, data: dict[str, Any]) -> None:
    assert event_from(name, data) is None

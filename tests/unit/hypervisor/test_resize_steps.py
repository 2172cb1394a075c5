"""What QEMU is asked when a machine changes its size, and what a guest or a QEMU that will not do it leads to."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HotplugRefused, QmpRefused
from hypervisor.qemu import resize
from hypervisor.qemu.events import event_from
from hypervisor.qemu.resize import Resizing
from hypervisor.spec import VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
PLACES = [
    {"type": "c", "vcpus-count": 1, "props": {"core-id": 2}},
    {"type": "c", "vcpus-count": 1, "props": {"core-id": 1}},
    {"type": "c", "vcpus-count": 1, "props": {"core-id": 0}, "qom-path": "/machine/unattached/device[0]"},
]


class Monitor:
    """Answers by command, and says things on its own after some of them."""

    def __init__(self, **answers: Any) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers = {"query-memory-devices": [], "query-cpus-fast": [cpu(0)]} | answers
        self.says: dict[str, tuple[str, dict[str, Any]]] = {}
        self._hearers: list[Callable[[Any], None]] = []

    async def execute(self, command: str, arguments: Any = None, *, fd: int | None = None) -> object:
        if arguments is not None:
            self.asked.append((command, dict(arguments)))
        answer = self.answers.get(command, {})
        if isinstance(answer, Exception):
            raise answer
        if command in self.says:
            event = event_from(*self.says[command])
            for hearer in self._hearers:
                hearer(event)
        return answer

    @contextmanager
    def listening(self, hearer: Callable[[Any], None]) -> Iterator[None]:
        self._hearers.append(hearer)
        yield
        self._hearers.remove(hearer)

    async def lost(self) -> None:
        await asyncio.Event().wait()


def cpu(index: int) -> dict[str, object]:
    return {"cpu-index": index, "thread-id": 100 + index, "qom-path": f"/c{index}"}


def resizing(monitor: Monitor, **changed: Any) -> Resizing:
    fields: dict[str, Any] = {"memory_slots": 2, "max_memory_mib": 1024, "max_vcpus": 3} | changed
    spec = VmSpec(name="n", run_dir=Path("/r"), qemu_path=Path("/q"), kernel=Path("/k"), **fields)
    qmp: Any = monitor
    return Resizing(spec, qmp)


def ost(status: int, source: int = 1, device: str = "dimm-0") -> tuple[str, dict[str, Any]]:
    return "ACPI_DEVICE_OST", {"info": {"device": device, "source": source, "status": status}}


@pytest.mark.parametrize(
    ("changed", "most"),
    [
        ({}, (3, 1024)),
        ({"max_vcpus": 0}, (1, 1024)),
        ({"memory_slots": 0}, (3, 256)),
        ({"memory_slots": 0, "virtio_mem": True, "max_memory_mib": 500}, (3, 384)),
        ({"max_memory_mib": 100}, (3, 256)),
        ({"arch": "aarch64"}, (3, 256)),
        ({"arch": "aarch64", "accel": "kvm"}, (1, 256)),
        ({"arch": "aarch64", "accel": "kvm", "virtio_mem": True}, (1, 1024)),
        ({"arch": "s390x"}, (3, 256)),
    ],
)
def test_room(changed: dict[str, Any], most: tuple[int, int]) -> None:
    ours = resizing(Monitor(), **changed)
    assert (ours.most_vcpus, ours.most_memory_mib) == most


async def test_processors_come_from_the_first_free_place_on() -> None:
    monitor = Monitor(**{"query-hotpluggable-cpus": PLACES})
    assert await resizing(monitor).grow_vcpus(1) == 1
    assert monitor.asked == []
    assert await resizing(monitor).grow_vcpus(9) == 3
    assert monitor.asked == [("device_add", {"driver": "c", "id": f"cpu-{n}", "core-id": n}) for n in (1, 2)]


async def test_only_processors_that_came_go_and_the_last_one_first() -> None:
    plugged = [
        {**place, "qom-path": f"/machine/peripheral/cpu-{2 - n}"} for n, place in enumerate(PLACES[:2])
    ]
    monitor = Monitor(
        **{"query-hotpluggable-cpus": [*plugged, PLACES[2]], "query-cpus-fast": [cpu(0), cpu(1), cpu(2)]},
    )
    monitor.answers["device_del"] = QmpRefused("device_del", "DeviceNotFound", "gone")
    assert await resizing(monitor).shrink_vcpus(2) == 2
    assert monitor.asked == [("device_del", {"id": "cpu-2"})]
    assert await resizing(monitor).shrink_vcpus(0) == 1
    monitor.answers["device_del"] = QmpRefused("device_del", "GenericError", "not supported")
    with pytest.raises(HotplugRefused, match=r"cannot unplug cpu-2: .* not supported"):
        await resizing(monitor).shrink_vcpus(1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"accel": "kvm"}, ""),
        ({"accel": "tcg"}, "a processor that it emulates"),
        ({"accel": "kvm", "arch": "s390x"}, "s390x machines let no processor go"),
    ],
)
def test_where_processors_stay(changed: dict[str, Any], words: str) -> None:
    assert words in resizing(Monitor(), **changed).why_vcpus_stay
    assert bool(words) == bool(resizing(Monitor(), **changed).why_vcpus_stay)


async def test_a_module_is_of_the_kind_of_the_other_memory() -> None:
    for changed, kind, more in (
        ({}, "memory-backend-memfd", {}),
        (
            {"hugepages": True, "memory_prealloc": True},
            "memory-backend-memfd",
            {"hugetlb": True, "prealloc": True},
        ),
        ({"memory_dir": Path("/m")}, "memory-backend-file", {"mem-path": "/m"}),
    ):
        monitor = Monitor()
        monitor.says["device_add"] = ost(0)
        await resizing(monitor, **changed).grow_memory(300)
        backend = {"qom-type": kind, "id": "memory-0", "size": 128 * MIB, "share": True}
        assert monitor.asked == [
            ("object-add", backend | more),
            ("device_add", {"driver": "pc-dimm", "id": "dimm-0", "memdev": "memory-0"}),
        ]


async def test_a_module_that_the_guest_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor()
    monitor.says["device_add"] = ost(0x81)
    with pytest.raises(
        HotplugRefused, match=r"add 128 MiB of memory: the guest refused it \(ACPI status 0x81\); its"
    ):
        await resizing(monitor).grow_memory(384)
    monkeypatch.setattr(resize, "PLUG_TIMEOUT_S", 0.01)
    # Of another device, and of another matter.
    for event in (ost(0, device="dimm-1"), ost(0, source=3)):
        monitor.says["device_add"] = event
        with pytest.raises(
            HotplugRefused, match=r"the guest did not take it within 0\.01 s; its kernel needs memory"
        ):
            await resizing(monitor).grow_memory(384)


async def test_a_module_that_qemu_refuses_leaves_nothing() -> None:
    monitor = Monitor(device_add=QmpRefused("device_add", "GenericError", "no slots"))
    with pytest.raises(
        HotplugRefused, match=r"cannot add 128 MiB of memory \(dimm-0\): .* no slots .*; set memory_slots"
    ):
        await resizing(monitor).grow_memory(384)
    assert monitor.asked[-1] == ("object-del", {"id": "memory-0"})


@pytest.mark.parametrize(
    ("command", "changed", "words"),
    [
        (
            "object-add",
            {},
            r"cannot add 128 MiB of memory \(memory-0, memory-backend-memfd\): .*; free memory of the host",
        ),
        (
            "qom-set",
            {"virtio_mem": True},
            "cannot fill virtio-mem0 up to 384 MiB of memory: .*; free memory of the host",
        ),
        (
            "device_add",
            {},
            "cannot add processor cpu-1 to the 1 of the machine: .*; lower the containers' CPU limits",
        ),
    ],
)
async def test_what_qemu_refuses_is_told_with_a_remedy(
    command: str, changed: dict[str, Any], words: str
) -> None:
    monitor = Monitor(**{"query-hotpluggable-cpus": PLACES})
    monitor.answers[command] = QmpRefused(command, "GenericError", "it will not")
    grows = resizing(monitor, **changed)
    with pytest.raises(HotplugRefused, match=words):
        await (grows.grow_vcpus(2) if command == "device_add" else grows.grow_memory(384))


async def test_one_comes_while_another_is_about_to_go() -> None:
    plugged = [PLACES[0], {**PLACES[1], "qom-path": "/machine/peripheral/cpu-1"}, PLACES[2]]
    monitor = Monitor(**{"query-hotpluggable-cpus": plugged, "query-cpus-fast": [cpu(0), cpu(1)]})
    ours = resizing(monitor)
    going = asyncio.create_task(ours.shrink_vcpus(1))
    while ("device_del", {"id": "cpu-1"}) not in monitor.asked:
        await asyncio.sleep(0)
    assert await ours.grow_vcpus(2) == 2
    assert monitor.asked[-1] == ("device_add", {"driver": "c", "id": "cpu-2", "core-id": 2})
    monitor.says["query-cpus-fast"] = ("DEVICE_DELETED", {"device": "cpu-1", "path": "/"})
    await ours.vcpus()
    assert await going == 1


async def test_memory_without_a_way_back_stays() -> None:
    monitor = Monitor()
    assert not await resizing(monitor).shrink_memory(256)
    assert await resizing(monitor, balloon=True).shrink_memory(300)
    assert monitor.asked == [("balloon", {"value": 384 * MIB})]

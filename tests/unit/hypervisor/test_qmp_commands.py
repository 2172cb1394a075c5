"""What each typed command sends and makes of the answer, and waiting for a device to be gone."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HotplugRefused, QmpRefused, QmpUnavailable
from hypervisor.qemu import commands
from hypervisor.qemu.qmp import connected
from hypervisor.sockets import unix_listener
from tests.unit.hypervisor.test_qmp import (
    QUICK,
    Peer,
    greets,
    ignore,
    monitors_at,
    running,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from hypervisor.qemu.qmp import Monitor

    Call = Callable[[Monitor], Awaitable[object]]


@asynccontextmanager
async def answering(folder: Path, reply: Mapping[str, Any]) -> AsyncIterator[tuple[Monitor, list[Any]]]:
    """A monitor that gives one answer to everything, and what it was asked: commands with their arguments."""
    asked: list[Any] = []

    async def answers(peer: Peer) -> None:
        await greets(peer)
        while True:
            message = await peer.receive()
            asked.append((message["execute"], message.get("arguments")))
            peer.send({**reply, "id": message["id"]})

    path = folder / "qmp.sock"
    async with monitors_at(path, answers), connected(path, QUICK, running(), ignore) as monitor:
        yield monitor, asked


SAID: list[tuple[Call, str, dict[str, Any] | None]] = [
    (lambda m: commands.remove_fd(m, 3), "remove-fd", {"fdset-id": 3}),
    (
        lambda m: commands.device_add(m, "virtio-blk-pci", "disk1", {"drive": "d1", "share-rw": True}),
        "device_add",
        {"driver": "virtio-blk-pci", "id": "disk1", "drive": "d1", "share-rw": True},
    ),
    (lambda m: commands.device_del(m, "disk1"), "device_del", {"id": "disk1"}),
    (
        lambda m: commands.object_add(m, "memory-backend-ram", "more", {"size": 1 << 27}),
        "object-add",
        {"qom-type": "memory-backend-ram", "id": "more", "size": 1 << 27},
    ),
    (lambda m: commands.object_del(m, "more"), "object-del", {"id": "more"}),
    (
        lambda m: commands.blockdev_add(
            m, "raw", "d1", {"file": {"driver": "file", "filename": "/dev/fdset/1"}}
        ),
        "blockdev-add",
        {"driver": "raw", "node-name": "d1", "file": {"driver": "file", "filename": "/dev/fdset/1"}},
    ),
    (lambda m: commands.blockdev_del(m, "d1"), "blockdev-del", {"node-name": "d1"}),
    (
        lambda m: commands.netdev_add_tap(m, "n1", ["fd0", "fd1"]),
        "netdev_add",
        {"type": "tap", "id": "n1", "fds": "fd0:fd1"},
    ),
    (
        lambda m: commands.netdev_add_tap(m, "n1", ["fd0", "fd1"], ["v0", "v1"]),
        "netdev_add",
        {"type": "tap", "id": "n1", "fds": "fd0:fd1", "vhost": True, "vhostfds": "v0:v1"},
    ),
    (lambda m: commands.netdev_del(m, "n1"), "netdev_del", {"id": "n1"}),
    (
        lambda m: commands.chardev_add_socket(m, "c1", Path("/a,b/s")),
        "chardev-add",
        {
            "id": "c1",
            "backend": {
                "type": "socket",
                "data": {"addr": {"type": "unix", "data": {"path": "/a,b/s"}}, "server": False},
            },
        },
    ),
    (
        lambda m: commands.chardev_add_socket(m, "c1", Path("/s"), reconnect_s=5),
        "chardev-add",
        {
            "id": "c1",
            "backend": {
                "type": "socket",
                "data": {
                    "addr": {"type": "unix", "data": {"path": "/s"}},
                    "server": False,
                    "reconnect": 5,
                },
            },
        },
    ),
    (lambda m: commands.chardev_remove(m, "c1"), "chardev-remove", {"id": "c1"}),
    (lambda m: commands.balloon(m, 1 << 28), "balloon", {"value": 1 << 28}),
    (
        lambda m: commands.migrate_set_capabilities(m, {"x-ignore-shared": True}),
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    ),
    (lambda m: commands.migrate(m, "exec:cat > f"), "migrate", {"uri": "exec:cat > f"}),
    (lambda m: commands.migrate_incoming(m, "exec:cat f"), "migrate-incoming", {"uri": "exec:cat f"}),
    (
        lambda m: commands.dump_guest_memory(m, "core", paging=True),
        "dump-guest-memory",
        {"protocol": "fd:core", "paging": True, "format": "elf", "detach": True},
    ),
    (lambda m: commands.qom_get(m, "d1", "addr"), "qom-get", {"path": "d1", "property": "addr"}),
    (
        lambda m: commands.qom_set(m, "virtiomem0", "requested-size", 1 << 30),
        "qom-set",
        {"path": "virtiomem0", "property": "requested-size", "value": 1 << 30},
    ),
]


@pytest.mark.parametrize(("call", "name", "arguments"), SAID, ids=[f"{name}" for _, name, _ in SAID])
async def test_what_is_said(tmp_path: Path, call: Call, name: str, arguments: dict[str, Any] | None) -> None:
    async with answering(tmp_path, {"return": {}}) as (monitor, asked):
        await call(monitor)
    assert asked == [(name, arguments)]


PCI_COMMAND = "query-pci"
PCI = [
    {
        "bus": 0,
        "devices": [
            {"bus": 0, "slot": 0, "function": 0, "qdev_id": "", "id": {"device": 1, "vendor": 2}},
            {
                "bus": 0,
                "slot": 29,
                "function": 0,
                "qdev_id": "rp0",
                "pci_bridge": {"devices": [{"bus": 1, "slot": 2, "function": 0, "qdev_id": "disk1"}]},
            },
        ],
    }
]
DIMM = {
    "type": "dimm",
    "data": {"id": "d0", "size": 1 << 27, "hotplugged": True, "hotpluggable": True, "node": 0},
}
VIRTIO_MEM = {"type": "virtio-mem", "data": {"size": 0, "requested-size": 1 << 30, "max-size": 1 << 31}}
PLACE = {"socket-id": 1, "core-id": 0, "thread-id": 0}
CPU = {"type": "max-x86_64-cpu", "vcpus-count": 1, "props": PLACE}

ANSWERED: list[tuple[Call, str, Any, Any]] = [
    (
        commands.query_fdsets,
        "query-fdsets",
        [{"fdset-id": 2, "fds": [{"fd": 11, "opaque": "disk"}, {"fd": 12}]}],
        (commands.FdSet(2, (commands.FdSet.Fd(11, "disk"), commands.FdSet.Fd(12))),),
    ),
    (
        commands.query_hotpluggable_cpus,
        "query-hotpluggable-cpus",
        [CPU, {**CPU, "qom-path": "/machine/unattached/device[0]"}],
        (
            commands.HotpluggableCpu("max-x86_64-cpu", 1, PLACE),
            commands.HotpluggableCpu("max-x86_64-cpu", 1, PLACE, "/machine/unattached/device[0]"),
        ),
    ),
    (
        commands.query_cpus_fast,
        "query-cpus-fast",
        [{"cpu-index": 0, "thread-id": 77, "qom-path": "/c", "target": "x86_64", "props": {}}],
        (commands.Cpu(0, 77, "/c"),),
    ),
    (
        commands.query_memory_devices,
        "query-memory-devices",
        [DIMM, VIRTIO_MEM],
        (
            commands.MemoryDevice("dimm", commands.MemoryDevice.Data(1 << 27, "d0", True, True)),
            commands.MemoryDevice("virtio-mem", commands.MemoryDevice.Data(0, requested_size=1 << 30)),
        ),
    ),
    (commands.query_balloon, "query-balloon", {"actual": 1 << 28}, 1 << 28),
    (commands.query_migrate, "query-migrate", {}, commands.Migration()),
    (
        commands.query_migrate,
        "query-migrate",
        {"status": "failed", "error-desc": "no space", "ram": {}},
        commands.Migration("failed", "no space"),
    ),
    (commands.qom_list_types, "qom-list-types", [{"name": "a", "parent": "b"}, {"name": "c"}], {"a", "c"}),
    (
        commands.query_machines,
        "query-machines",
        [{"name": "pc-q35-7.2", "alias": "q35", "cpu-max": 288}, {"name": "none"}],
        (commands.Machine("pc-q35-7.2", "q35"), commands.Machine("none")),
    ),
]


@pytest.mark.parametrize(
    ("call", "name", "reply", "answer"), ANSWERED, ids=[name for _, name, _, _ in ANSWERED]
)
async def test_what_is_answered(tmp_path: Path, call: Call, name: str, reply: Any, answer: Any) -> None:
    async with answering(tmp_path, {"return": reply}) as (monitor, asked):
        assert await call(monitor) == answer
    assert asked == [(name, None)]


@pytest.mark.parametrize(
    "call", [call for call, _, _, _ in ANSWERED], ids=[name for _, name, _, _ in ANSWERED]
)
@pytest.mark.parametrize(
    "reply", [7, [[]], [{"name": 7}], {"actual": "much", "status": 3}, [{"fdset-id": -1}]]
)
async def test_an_answer_of_another_shape_is_refused(tmp_path: Path, call: Call, reply: Any) -> None:
    async with answering(tmp_path, {"return": reply}) as (monitor, _):
        with pytest.raises(QmpUnavailable, match="with something else than it should") as told:
            await call(monitor)
    assert "\n" not in str(told.value)


async def test_a_device_is_found_behind_bridges(tmp_path: Path) -> None:
    async with answering(tmp_path, {"return": PCI}) as (monitor, asked):
        buses = await commands.query_pci(monitor)
    assert asked == [(PCI_COMMAND, None)]
    assert commands.pci_path(buses, "disk1") == "1d/02"
    assert commands.pci_path(buses, "rp0") == "1d"
    assert commands.pci_path(buses, "disk2") is None


@pytest.mark.parametrize("name", ["getfd", "add-fd"])
async def test_a_descriptor_goes_with_its_command(tmp_path: Path, name: str) -> None:
    """What QEMU gets is the same open file, before the command or with it; ours stays ours."""
    path = tmp_path / "qmp.sock"
    listener = unix_listener(path)
    received: list[tuple[int, str]] = []

    def serve() -> None:
        peer, _ = listener.accept()
        with peer, peer.makefile("rwb") as stream:
            stream.write(
                b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}\n'
            )
            stream.flush()
            for _ in range(2):
                data, fds = b"", array.array("i")
                while True:
                    piece, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4))
                    data += piece
                    for _, _, content in ancillary:
                        fds.frombytes(content)
                    try:
                        message = json.loads(data)
                    except json.JSONDecodeError:
                        continue
                    break
                for fd in fds:
                    received.append((os.fstat(fd).st_ino, message["execute"]))
                    os.close(fd)
                reply = {"return": {"fdset-id": 4, "fd": 9}, "id": message.get("id")}
                stream.write(json.dumps(reply).encode() + b"\n")
                stream.flush()

    file = tmp_path / "file"
    file.touch()
    with listener:
        serving = asyncio.get_running_loop().run_in_executor(None, serve)
        with file.open() as opened:
            async with connected(path, QUICK, running(), ignore) as monitor:
                if name == "getfd":
                    await commands.getfd(monitor, "fd0", opened.fileno())
                else:
                    assert await commands.add_fd(monitor, opened.fileno(), "disk") == 4
            os.fstat(opened.fileno())
        await serving
    assert received == [(file.stat().st_ino, name)]


STAMP = {"seconds": 1, "microseconds": 2}
GONE = {"event": "DEVICE_DELETED", "data": {"device": "disk1", "path": "/m"}, "timestamp": STAMP}
OTHER = {"event": "DEVICE_DELETED", "data": {"device": "disk2", "path": "/n"}, "timestamp": STAMP}
DENIED = {
    "event": "ACPI_DEVICE_OST",
    "data": {"info": {"device": "disk1", "source": 3, "status": 0x82, "slot": "0", "slot-type": "CPU"}},
    "timestamp": STAMP,
}
UNDER_WAY = {
    "event": "ACPI_DEVICE_OST",
    "data": {"info": {"device": "disk1", "source": 3, "status": 0x84, "slot": "0", "slot-type": "CPU"}},
    "timestamp": STAMP,
}
KEPT = {"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "disk1", "path": "/m"}, "timestamp": STAMP}
DONE: dict[str, Any] = {"return": {}}
ABSENT = {"error": {"class": "DeviceNotFound", "desc": "Device 'disk1' not found"}}
BUSY = {"error": {"class": "GenericError", "desc": "Device disk1 is already in the process of unplug"}}


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([DONE, OTHER, GONE], None, ""),
        ([GONE, DONE], None, ""),
        ([ABSENT], None, ""),
        ([DONE, OTHER], HotplugRefused, r"did not let go of it within 0\.1 s; stop what uses it"),
        ([DONE, KEPT], HotplugRefused, "the guest refused; stop what uses it"),
        ([DONE, DENIED], HotplugRefused, "the guest refused; stop what uses it"),
        ([DONE, UNDER_WAY, GONE], None, ""),
        ([BUSY], HotplugRefused, "already in the process of unplug"),
        ([DONE, None], QmpUnavailable, "went away while disk1 was being unplugged"),
        ([None], QmpUnavailable, "is gone, cannot device_del"),
    ],
)
async def test_unplugging_waits_for_the_guest(
    tmp_path: Path, messages: list[dict[str, Any] | None], error: type[Exception] | None, words: str
) -> None:
    async def answers(peer: Peer) -> None:
        await greets(peer)
        message = await peer.receive()
        assert (message["execute"], message["arguments"]) == ("device_del", {"id": "disk1"})
        for reply in messages:
            if reply is None:
                return
            peer.send(reply if "event" in reply else {**reply, "id": message["id"]})
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, answers), connected(path, QUICK, running(), ignore) as monitor:
        if error is None:
            await commands.unplug(monitor, "disk1", timeout_s=5)
        else:
            with pytest.raises(error, match=words):
                await commands.unplug(monitor, "disk1", timeout_s=0.1)
        assert monitor._listeners == [ignore]


async def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    async with answering(tmp_path, {"error": {"class": "GenericError", "desc": "no\n" * 1000}}) as (
        monitor,
        _,
    ):
        with pytest.raises(QmpRefused) as told:
            await commands.object_del(monitor, "x")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("version", "pause_s", "member"),
    [
        ((7, 2, 22), 5, {"reconnect": 5}),
        ((9, 1, 3), 5, {"reconnect": 5}),
        ((9, 2, 0), 5, {"reconnect-ms": 5000}),
        ((11, 1, 0), 5, {"reconnect-ms": 5000}),
        ((11, 1, 0), 0, {}),
    ],
)
def test_when_to_connect_again(version: tuple[int, int, int], pause_s: int, member: dict[str, int]) -> None:
    assert commands.reconnecting(version, pause_s) == member

"""Saving the memory of a guest that gave up, with a QEMU that only answers; and nothing is left of what failed."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import DumpFailed, QmpRefused
from hypervisor.qemu import dump
from hypervisor.qemu.events import BalloonChanged, GuestPanicked, Shutdown
from hypervisor.qemu.qmp import connected
from hypervisor.spec import VmSpec
from tests.unit.hypervisor.test_qmp import QUICK, Peer, greets, ignore, monitors_at, running

if TYPE_CHECKING:
    from hypervisor.qemu.events import Event

STAMP = {"seconds": 1, "microseconds": 2}
DONE: dict[str, Any] = {"return": {}}


def completed(status: str, **more: Any) -> dict[str, Any]:
    result = {"status": status, "completed": 1, "total": 1}
    return {"event": "DUMP_COMPLETED", "data": {"result": result, **more}, "timestamp": STAMP}


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    return VmSpec(
        name="s",
        run_dir=tmp_path,
        qemu_path=Path("/qemu"),
        kernel=Path("/k"),
        memory_mib=256,
        dump_dir=tmp_path / "crash" / "s",
        dump_paging=True,
    )


@pytest.mark.parametrize(
    ("event", "panic"),
    [
        (GuestPanicked(action="pause"), True),
        (Shutdown(reason="guest-reset", guest=True), True),
        (Shutdown(reason="guest-shutdown", guest=True), False),
        (Shutdown(reason="host-qmp-quit", guest=False), False),
        (BalloonChanged(actual=1), False),
    ],
)
def test_what_is_a_panic(event: Event, panic: bool) -> None:
    assert dump.is_panic(event) is panic


async def saved(tmp_path: Path, spec: VmSpec, messages: list[Any], heard: list[Any]) -> Path:
    """Saves with a monitor that sends these: answers, one for each command, and events; None hangs up."""

    async def answers(peer: Peer) -> None:
        await greets(peer)
        for message in messages:
            if message is None:
                return
            if "event" not in message:
                command = await peer.receive()
                heard.append((command["execute"], command["arguments"]))
                message = {**message, "id": command["id"]}
            peer.send(message)
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, answers), connected(path, QUICK, running(), ignore) as monitor:
        return await dump.guest_memory(monitor, spec, ["/qemu", "-x"], ["Kernel panic"])


async def test_the_files(tmp_path: Path, spec: VmSpec) -> None:
    heard: list[Any] = []
    core = await saved(tmp_path, spec, [DONE, DONE, completed("completed")], heard)
    words = {"protocol": "fd:vmcore", "paging": True, "format": "elf", "detach": True}
    assert heard == [("getfd", {"fdname": "vmcore"}), ("dump-guest-memory", words)]
    assert core.parent == spec.dump_dir
    assert core.name.startswith("vmcore-20")
    assert core.suffix == ".elf"
    state = core.with_suffix(".json")
    assert json.loads(state.read_bytes()) == {
        "qemu": [7, 2, 22],
        "arguments": ["/qemu", "-x"],
        "console": ["Kernel panic"],
    }
    assert sorted(core.parent.iterdir()) == [core, state]
    assert [file.stat().st_mode & 0o777 for file in (core, state, core.parent)] == [0o600, 0o600, 0o700]


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([DONE, DONE, completed("failed", error="disk full")], DumpFailed, "QEMU said: disk full"),
        ([DONE, DONE, None], DumpFailed, "QEMU went away"),
        ([DONE, DONE], DumpFailed, r"not done within 0\.1 s"),
        (
            [DONE, {"error": {"class": "GenericError", "desc": "there is a dump"}}],
            QmpRefused,
            "refused dump-guest-memory",
        ),
    ],
)
async def test_nothing_is_left_of_what_failed(
    tmp_path: Path,
    spec: VmSpec,
    messages: list[Any],
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dump, "_LEAST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(dump, "_SLOWEST_MIB_PER_S", 1 << 20)
    with pytest.raises(error, match=words):
        await saved(tmp_path, spec, messages, [])
    assert spec.dump_dir is not None
    assert list(spec.dump_dir.iterdir()) == []


async def test_nothing_is_left_of_what_was_cancelled(tmp_path: Path, spec: VmSpec) -> None:
    heard: list[Any] = []
    saving = asyncio.create_task(saved(tmp_path, spec, [DONE, DONE], heard))
    while len(heard) < 2:
        await asyncio.sleep(0.01)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert spec.dump_dir is not None
    assert list(spec.dump_dir.iterdir()) == []


@pytest.mark.parametrize(("free_mib", "enough"), [(512, True), (511, False), (0, False)])
async def test_twice_the_memory_has_to_be_free(
    tmp_path: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch, free_mib: int, enough: bool
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_mib * 256, f_frsize=4096))
    if enough:
        await saved(tmp_path, spec, [DONE, DONE, completed("completed")], [])
        return
    with pytest.raises(DumpFailed, match=rf"has {free_mib} MiB left, and 512 are asked for"):
        await saved(tmp_path, spec, [], [])


async def test_a_place_that_is_none(tmp_path: Path, spec: VmSpec) -> None:
    (tmp_path / "crash").touch()
    with pytest.raises(OSError, match="Not a directory"):
        await saved(tmp_path, spec, [], [])

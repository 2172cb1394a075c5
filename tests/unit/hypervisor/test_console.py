"""The guest's console: always read, never kept in full."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from hypervisor.console import TAIL_LINES, Console

if TYPE_CHECKING:
    from pathlib import Path


async def until_closed(console: Console) -> None:
    async with asyncio.timeout(10):
        while not console.closed:
            await asyncio.sleep(0.001)


async def wrote(data: bytes, path: Path, log_bytes: int) -> Console:
    ours, guests = socket.socketpair()
    console = Console(ours, path, log_bytes=log_bytes)
    guests.setblocking(False)
    with guests:
        await asyncio.get_running_loop().sock_sendall(guests, data)
    await until_closed(console)
    return console


async def test_a_little(tmp_path: Path) -> None:
    console = await wrote(b"Booting\r\nKernel panic\r\n", tmp_path / "console.log", 1000)
    assert console.tail() == ["Booting", "Kernel panic"]
    assert (tmp_path / "console.log").read_bytes() == b"Booting\r\nKernel panic\r\n"
    assert (tmp_path / "console.log").stat().st_mode & 0o777 == 0o600


async def test_a_panic_and_all_that_follows_it(tmp_path: Path) -> None:
    trace = b"".join(b"[    6.1] R%d: 0000000000000000\n" % n for n in range(120))
    console = await wrote(b"Kernel panic - not syncing\n" + trace, tmp_path / "console.log", 1 << 20)
    assert console.tail()[0] == "Kernel panic - not syncing"


async def test_a_flood_fills_neither_memory_nor_disk(tmp_path: Path) -> None:
    limit = 200_000
    flood = b"".join(b"line %d\n" % n for n in range(200_000))
    console = await wrote(flood, tmp_path / "console.log", limit)
    assert console.tail() == [f"line {n}" for n in range(200_000 - TAIL_LINES, 200_000)]
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["console.log", "console.log.1"]
    assert sum(file.stat().st_size for file in files) <= limit
    assert files[0].read_bytes().endswith(b"line 199999\n")


async def test_a_log_that_cannot_be_written_does_not_stop_the_reading(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    ours, guests = socket.socketpair()
    console = Console(ours, folder / "console.log", log_bytes=20)
    (folder / "console.log").unlink()
    folder.rmdir()
    with guests:
        guests.sendall(b"first line\nsecond line\n")
    await until_closed(console)
    assert console.tail() == ["first line", "second line"]


async def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    ours, guests = socket.socketpair()
    with guests:
        console = Console(ours, tmp_path / "console.log")
        console.close()
        console.close()
        console.drain()
    assert console.tail() == []


async def test_drain_takes_what_the_loop_has_not_seen(tmp_path: Path) -> None:
    ours, guests = socket.socketpair()
    console = Console(ours, tmp_path / "console.log")
    with guests:
        guests.sendall(b"last words")
    console.drain()
    assert console.tail() == ["last words"]
    assert console.closed

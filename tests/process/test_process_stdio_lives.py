"""A thousand short lives in a few sandboxes, with a mebibyte of output each: every byte arrives."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.process.test_process_stdio import MIB
from tests.support import host
from tests.support.bundles import make_fifos, read_all, shell, spec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_containerd import FakeContainerd, Shim

SANDBOXES = 2
LIVES = 1000
AT_ONCE = 8  # in one sandbox
KINDS = ("stdout", "stderr", "both", "terminal")


@pytest.mark.timeout(170)
async def test_a_thousand_lives(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(MIB)
    numbers = iter(range(LIVES))
    wrong: list[str] = []

    async def one_after_the_other(shim: Shim) -> None:
        for number in numbers:
            wrong.extend(await live(containerd, shim, number, data))

    async def sandbox(index: int) -> None:
        bundle = containerd.bundle(f"{name}-{index}", spec(shell("exec sleep 1000")))
        shim = await containerd.start(bundle.name, bundle)
        await shim.create()
        await shim.call("Start")
        before = host.open_files(shim.pid)
        await asyncio.gather(*(one_after_the_other(shim) for _ in range(AT_ONCE)))
        assert host.open_files(shim.pid) == before

    await asyncio.gather(*map(sandbox, range(SANDBOXES)))
    assert wrong == []


async def live(containerd: FakeContainerd, shim: Shim, number: int, data: Path) -> list[str]:
    """One container (every tenth) or exec from its start to its deletion; what is wrong with its output."""
    kind = KINDS[number % len(KINDS)]
    streams = {"stdout": ("stdout",), "stderr": ("stderr",), "both": ("stdout", "stderr")}.get(
        kind, ("stdout",)
    )
    marks = {"stdout": "", "stderr": " >&2"}
    script = "".join(f"cat {data}{marks[s]}; echo the end of {number}{marks[s]}; " for s in streams)
    init = shell(f"{script}exit {number % 256}")
    named: dict[str, object]
    if number % 10 == 0:
        bundle = containerd.bundle(f"{shim.id}-{number}", spec(init))
        stdio = make_fifos(bundle / "io", *streams)
        named = {"id": bundle.name}
        await shim.create(bundle.name, bundle=bundle, **stdio._asdict(), terminal=kind == "terminal")
    else:
        stdio = make_fifos(shim.bundle / str(number), *streams)
        named = {"exec_id": str(number)}
        await shim.exec(str(number), init, **stdio._asdict(), terminal=kind == "terminal")
    reading = [asyncio.create_task(read_all(getattr(stdio, stream))) for stream in streams]
    await asyncio.sleep(0)  # they are open now
    await shim.call("Start", **named)
    status = (await shim.call("Wait", **named)).exit_status
    await shim.call("Delete", **named)
    want = hashlib.sha256(MIB + b"the end of %d\n" % number).digest()
    found = [f"{number} exits with {status}"] if status != number % 256 else []
    for stream, output in zip(streams, await asyncio.gather(*reading), strict=True):
        if hashlib.sha256(output).digest() != want:
            found.append(f"{number}: {stream} has {len(output)} bytes and ends with {output[-40:]!r}")
    return found

"""The program by itself: its other actions, its usage errors, and its log."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from typing import TYPE_CHECKING

import pytest

from shim import RUNTIME_NAME, VERSION
from shim.api.gen import types_pb2
from tests.support.bundles import FifoEnd, shell, spec
from tests.support.fake_containerd import program_answer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_containerd import FakeContainerd


@pytest.mark.parametrize("stdin", [None, b"", b"\xff\xff garbage"], ids=["no pipe", "nothing", "garbage"])
async def test_info(containerd: FakeContainerd, stdin: bytes | None) -> None:
    answer = await program_answer(containerd.program, "-info", stdin=stdin)
    assert (answer.code, answer.errors) == (0, "")
    info = types_pb2.RuntimeInfo.FromString(answer.output)
    assert (info.name, info.version.version) == (RUNTIME_NAME, VERSION)
    assert not info.HasField("options")
    assert info.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    features = json.loads(info.features.value)
    # containerd refuses id-mapped mounts by this, and breaks when the way to it is missing.
    assert features["linux"]["mountExtensions"]["idmap"]["enabled"] is False


async def test_info_tells_the_options(containerd: FakeContainerd, config: Path) -> None:
    answer = await program_answer(containerd.program, "-info", stdin=containerd.options())
    info = types_pb2.RuntimeInfo.FromString(answer.output)
    assert info.options.SerializeToString() == containerd.options()


async def test_info_without_any_stdin(containerd: FakeContainerd) -> None:
    answer = await program_answer("/bin/sh", "-c", 'exec "$0" -info <&-', containerd.program)
    assert (answer.code, answer.errors) == (0, "")
    assert types_pb2.RuntimeInfo.FromString(answer.output).name == RUNTIME_NAME


async def test_info_on_a_terminal(containerd: FakeContainerd) -> None:
    """Somebody tries it by hand: nothing is waited for."""
    master, slave = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            containerd.program, "-info", stdin=slave, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    finally:
        os.close(master)
        os.close(slave)
    assert types_pb2.RuntimeInfo.FromString(output).name == RUNTIME_NAME


@pytest.mark.parametrize("flag", ["-v", "--version"])
async def test_version(containerd: FakeContainerd, flag: str) -> None:
    answer = await program_answer(containerd.program, flag)
    assert (answer.code, VERSION in answer.output.decode(), answer.errors) == (0, True, "")


async def test_help(containerd: FakeContainerd) -> None:
    answer = await program_answer(containerd.program, "-h")
    assert (answer.code, answer.output[:6], answer.errors) == (0, b"usage:", "")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no action given"),
        (["restart"], "unknown action 'restart'"),
        (["-nonsense", "start"], "flag provided but not defined: -nonsense"),
        (["-id"], "flag needs an argument: -id"),
        (["-debug=maybe", "start"], "invalid boolean value 'maybe'"),
        (["start", "delete"], "one action expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_bad_usage(containerd: FakeContainerd, words: list[str], problem: str) -> None:
    answer = await program_answer(containerd.program, *words)
    assert (answer.code, answer.output) == (2, b"")
    assert problem in answer.errors
    assert "usage:" in answer.errors


async def test_log_lines(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("exit 0")))
    with FifoEnd.reader(str(bundle / "log")) as log:  # containerd opens it before the start
        shim = await containerd.start(name, bundle)
        await shim.create()
        await shim.shutdown(now=True)
        lines = (await log.read_to_end()).decode().splitlines()
    assert len(lines) >= 3
    for line in lines:
        assert line.startswith("timestamp=20"), line
        assert f" sandbox={name} " in f"{line} ", line
        assert " namespace=fake" in line
    assert any(" msg=machine_started " in line for line in lines)


def _full_fifo(path: Path) -> FifoEnd:
    """A pipe that nobody empties and nothing more fits into."""
    end = FifoEnd(str(path), os.O_RDWR)
    fcntl.fcntl(end.fd, fcntl.F_SETPIPE_SZ, 4096)
    os.write(end.fd, b"x" * 4096)
    return end


async def test_full_log(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("exit 6")))
    with _full_fifo(bundle / "log"):
        shim = await containerd.start(name, bundle)
        await shim.create()
        await shim.call("Start")
        assert (await shim.call("Wait")).exit_status == 6
        await shim.shutdown(now=True)


async def test_no_log(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("exit 6")))
    (bundle / "log").unlink()
    shim = await containerd.start(name, bundle)
    await shim.create()
    await shim.call("Start")
    assert (await shim.call("Wait")).exit_status == 6
    await shim.shutdown(now=True)

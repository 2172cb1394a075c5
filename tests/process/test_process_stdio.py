"""Streams through the real program, byte for byte: FIFO, shim, agent, process and back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from typing import TYPE_CHECKING

import pytest

from shim.api.gen import events_pb2
from tests.support import host
from tests.support.bundles import FifoEnd, make_fifos, process, read_all, shell, spec
from tests.support.fake_containerd import task_events

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

MIB = random.Random(1).randbytes(1 << 20)


async def started(containerd: FakeContainerd, name: str, init: dict[str, object], *streams: str) -> Shim:
    """A running container with FIFOs for these streams in `bundle/io`."""
    bundle = containerd.bundle(name, spec(init))
    stdio = make_fifos(bundle / "io", *streams)
    shim = await containerd.start(name, bundle)
    await shim.create(**stdio._asdict())
    await shim.call("Start")
    return shim


def fifo(shim: Shim, stream: str) -> str:
    return str(shim.bundle / "io" / stream)


async def feed(shim: Shim, data: bytes) -> None:
    """Write to stdin and close, as a client whose input has ended does: first itself, then `CloseIO`."""
    with FifoEnd.writer(fifo(shim, "stdin")) as stdin:
        await stdin.write(data)
    await shim.call("CloseIO", stdin=True)


async def test_a_mebibyte_there_and_back(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, process(["/bin/cat"]), "stdin", "stdout")
    reading = asyncio.create_task(read_all(fifo(shim, "stdout")))
    await feed(shim, MIB)
    assert hashlib.sha256(await reading).digest() == hashlib.sha256(MIB).digest()
    assert (await shim.call("Wait")).exit_status == 0


async def test_all_streams_of_an_exec(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, shell("exec sleep 100"), "stdout")
    stdio = make_fifos(shim.bundle / "exec")
    await shim.exec("e", shell("cat; echo done >&2"), **stdio._asdict())
    await shim.call("Start", exec_id="e")
    with FifoEnd.writer(stdio.stdin) as stdin:
        await stdin.write(b"a\0b\n")
    await shim.call("CloseIO", exec_id="e", stdin=True)
    assert (await read_all(stdio.stdout), await read_all(stdio.stderr)) == (b"a\0b\n", b"done\n")


@pytest.mark.timeout(120)
async def test_two_hundred_execs_with_a_word_of_input(containerd: FakeContainerd, name: str) -> None:
    """`echo x | ctr tasks exec ... cat`, again and again: no end of the input is missed."""
    shim = await started(containerd, name, shell("exec sleep 100"), "stdout")
    before = host.open_files(shim.pid)
    for number in range(200):
        exec_id, word = f"e{number}", b"%d\n" % number
        stdio = make_fifos(shim.bundle / exec_id, "stdin", "stdout")
        await shim.exec(exec_id, process(["/bin/cat"]), **stdio._asdict())
        await shim.call("Start", exec_id=exec_id)
        async with asyncio.timeout(2):
            with FifoEnd.writer(stdio.stdin) as stdin:
                await stdin.write(word)
            await shim.call("CloseIO", exec_id=exec_id, stdin=True)
            assert await read_all(stdio.stdout) == word
            assert (await shim.call("Wait", exec_id=exec_id)).exit_status == 0
        await shim.call("Delete", exec_id=exec_id)
    assert host.open_files(shim.pid) == before


async def test_stdin_ends_only_when_both_have_closed(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, process(["/bin/cat"]), "stdin", "stdout")
    with FifoEnd.reader(fifo(shim, "stdout")) as stdout:
        with FifoEnd.writer(fifo(shim, "stdin")) as stdin:
            await stdin.write(b"one ")
        assert await stdout.read_exactly(4) == b"one "
        with FifoEnd.writer(fifo(shim, "stdin")) as stdin:  # a client that comes back
            await shim.call("CloseIO", stdin=True)
            await stdin.write(b"two")
            assert await stdout.read_exactly(3) == b"two"
        assert await stdout.read_to_end() == b""
    assert (await shim.call("Wait")).exit_status == 0


async def test_close_io_without_stdin(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, shell("exit 0"), "stdout")
    await shim.call("CloseIO", stdin=True)
    await shim.call("CloseIO")
    await shim.call("Wait")


async def test_slow_reader_loses_nothing_and_holds_up_nothing(
    containerd: FakeContainerd, name: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(2 * MIB)  # more than a FIFO and what is under way
    shim = await started(containerd, name, shell(f"cat {data}; echo other >&2"), "stdout", "stderr")
    with FifoEnd.reader(fifo(shim, "stdout")) as stdout:
        first = await stdout.read_exactly(10)
        await shim.exec("e", shell("exit 4"))  # the shim works on meanwhile
        await shim.call("Start", exec_id="e")
        assert (await shim.call("Wait", exec_id="e")).exit_status == 4
        app = containerd.bundle(
            f"{name}-app", spec(shell(f"cat {data}"))
        )  # so does another container of the pod
        stdio = make_fifos(app / "io", "stdout")
        await shim.create(app.name, bundle=app, **stdio._asdict())
        reading = asyncio.create_task(read_all(stdio.stdout))
        await shim.call("Start", id=app.name)
        assert await reading == 2 * MIB
        assert (await shim.call("Wait", id=app.name)).exit_status == 0
        await shim.call("Delete", id=app.name)
        assert (await shim.call("State")).status == 2  # it waits for its reader
        for _ in range(20):
            first += await stdout.read_exactly(1024)
            await asyncio.sleep(0.02)  # the reader's pace
        rest = await stdout.read_to_end(size=8192)
    assert first + rest == 2 * MIB
    assert await read_all(fifo(shim, "stderr")) == b"other\n"
    assert (await shim.call("Wait")).exit_status == 0


async def test_reader_that_comes_after_the_exit(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, shell("echo quick"), "stdout")
    await shim.call("Wait")
    assert await read_all(fifo(shim, "stdout")) == b"quick\n"


async def test_reader_that_goes_and_comes_back(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(MIB)
    shim = await started(containerd, name, process(["/bin/cat", str(data)]), "stdout")
    with FifoEnd.reader(fifo(shim, "stdout")) as stdout:
        first = await stdout.read_exactly(100_000)
    assert first + await read_all(fifo(shim, "stdout")) == MIB


async def test_no_stdio(containerd: FakeContainerd, agent: FakeAgent, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("echo nobody listens; cat; exit 5")))
    shim = await containerd.start(name, bundle)
    await shim.create()
    await shim.call("Start")
    await shim.call("Kill", signal=9)
    await shim.call("Wait")
    await shim.call("Delete")
    await shim.shutdown()
    methods = {request.method for request in agent.requests.items}
    assert not methods & {"ReadStdout", "ReadStderr", "WriteStdin"}


async def test_output_into_a_file(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    file = tmp_path / "out.log"
    file.write_text("before\n")
    bundle = containerd.bundle(name, spec(shell("echo new; echo err >&2")))
    shim = await containerd.start(name, bundle)
    await shim.create(stdout=f"file://{file}", stderr=f"file://{tmp_path}/err.log")
    await shim.call("Start")
    await shim.call("Wait")
    await shim.call("Delete")
    await shim.shutdown()
    assert (file.read_text(), (tmp_path / "err.log").read_text()) == ("before\nnew\n", "err\n")


async def test_fifo_scheme(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("echo here")))
    stdio = make_fifos(bundle / "io", "stdout")
    shim = await containerd.start(name, bundle)
    await shim.create(stdout=f"fifo://{stdio.stdout}")
    await shim.call("Start")
    assert await read_all(stdio.stdout) == b"here\n"


async def test_exec_whose_child_keeps_stdout_open(
    containerd: FakeContainerd, agent: FakeAgent, name: str
) -> None:
    shim = await started(containerd, name, shell("exec sleep 100"), "stdout")
    before = host.open_files(shim.pid)
    stdio = make_fifos(shim.bundle / "exec", "stdout")
    await shim.exec("e", shell("echo out; sleep 100 & exit 3"), **stdio._asdict())
    await shim.call("Start", exec_id="e")
    await asyncio.shield(agent.process(name, "e").exited)
    async with asyncio.timeout(1):
        end = await containerd.event(events_pb2.TaskExit, id="e")
    assert end.exit_status == 3
    with FifoEnd.reader(stdio.stdout) as stdout:
        assert await stdout.read_exactly(4) == b"out\n"
        await shim.call("Delete", exec_id="e")
        assert await stdout.read_to_end() == b""
    assert host.open_files(shim.pid) == before


async def test_client_that_stops_reading_when_it_learns_of_the_exit(
    containerd: FakeContainerd, name: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(MIB)
    shim = await started(containerd, name, shell("exec sleep 100"), "stdout")
    for exec_id in map(str, range(10)):
        stdio = make_fifos(shim.bundle / exec_id, "stdout")
        await shim.exec(exec_id, shell(f"cat {data}; echo the end"), **stdio._asdict())
        got = bytearray()
        with FifoEnd.reader(stdio.stdout) as stdout:
            reading = asyncio.create_task(collect(stdout, got))
            await shim.call("Start", exec_id=exec_id)
            await shim.call("Wait", exec_id=exec_id)
            assert got == MIB + b"the end\n"
            await reading


async def collect(stream: FifoEnd, into: bytearray) -> None:
    while data := await stream.read(1 << 16):
        into += data


async def test_process_that_does_not_read(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, shell("sleep 100"), "stdin", "stdout")
    before = host.open_files(shim.pid)
    stdio = make_fifos(shim.bundle / "exec", "stdin")
    await shim.exec("e", shell("exec sleep 100"), **stdio._asdict())
    await shim.call("Start", exec_id="e")
    with FifoEnd.writer(stdio.stdin) as stdin:
        writing = asyncio.create_task(stdin.write(MIB))
        await shim.call("Kill", exec_id="e", signal=9)
        await shim.call("Wait", exec_id="e")
        await shim.call("Delete", exec_id="e")
        with pytest.raises(BrokenPipeError):
            await writing
    assert host.open_files(shim.pid) == before


async def test_terminal(containerd: FakeContainerd, agent: FakeAgent, name: str) -> None:
    bundle = containerd.bundle(name, spec(shell("exec sleep 100") | {"terminal": True}))
    stdio = make_fifos(bundle / "io", "stdin", "stdout")
    shim = await containerd.start(name, bundle)
    await shim.create(**stdio._asdict(), terminal=True)
    await shim.call("ResizePty", width=80, height=25)
    await shim.call("Start")
    await shim.call("ResizePty", width=100, height=50)
    assert (await shim.call("State")).terminal
    await shim.exec("e", shell("exec sleep 100"), stdout=stdio.stdout, terminal=True)
    await shim.call("ResizePty", exec_id="e", width=132, height=43)
    await shim.call("Start", exec_id="e")
    assert (await agent.request("ExecProcess")).process.Terminal
    sizes = [
        (request.message.exec_id, request.message.column, request.message.row)
        for request in agent.requests.items
        if request.method == "TtyWinResize"
    ]
    # The agent knows the init since Create, but an exec only since its start.
    assert sizes[0] == ("", 80, 25)
    assert ("", 100, 50) in sizes
    assert sizes[-1] == ("e", 132, 43)
    assert agent.methods().index("ExecProcess") < len(agent.methods()) - 1


async def test_a_hundred_execs_at_once(containerd: FakeContainerd, name: str) -> None:
    shim = await started(containerd, name, shell("exec sleep 100"), "stdout")
    before = host.open_files(shim.pid)

    async def run(number: int) -> tuple[int, bytes]:
        exec_id = f"e{number}"
        stdio = make_fifos(shim.bundle / exec_id, "stdout")
        await shim.exec(exec_id, shell(f"echo {number}; exit {number}"), **stdio._asdict())
        await shim.call("Start", exec_id=exec_id)
        output = await read_all(stdio.stdout)
        status = (await shim.call("Wait", exec_id=exec_id)).exit_status
        assert (await shim.call("Delete", exec_id=exec_id)).exit_status == status
        return status, output

    results = await asyncio.gather(*map(run, range(100)))
    assert results == [(number, b"%d\n" % number) for number in range(100)]
    events = task_events(await containerd.events.until(lambda items: len(items) >= 2 + 400))
    for number in range(100):
        topics = [topic for topic, exec_id in events if exec_id == f"e{number}"]
        assert topics == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/delete"]
    assert host.open_files(shim.pid) == before
    assert len(os.listdir(f"/proc/{shim.pid}/task")) == 1


async def test_deleting_one_container_of_a_pod_takes_its_output_out_of_the_guest_first(
    containerd: FakeContainerd, agent: FakeAgent, name: str, tmp_path: Path
) -> None:
    """Removing a container closes its pipes in the guest, and with them goes what is still inside."""
    data = tmp_path / "data"
    data.write_bytes(MIB + MIB[:100_000])  # more than a FIFO, so that copying waits for the reader
    shim = await started(containerd, name, shell("exec sleep 100"))
    app = containerd.bundle(f"{name}-app", spec(shell(f"cat {data}")))
    stdio = make_fifos(app / "io", "stdout")
    await shim.create(app.name, bundle=app, **stdio._asdict())
    await shim.call("Start", id=app.name)
    await shim.call("Wait", id=app.name)
    deleting = asyncio.create_task(shim.call("Delete", id=app.name))
    for _ in range(3):  # answered after the shim has begun with Delete
        await shim.call("State")
    with FifoEnd.reader(stdio.stdout) as stdout:
        assert await stdout.read_to_end() == MIB + MIB[:100_000]
    await deleting
    methods = [r.method for r in agent.requests.items if getattr(r.message, "container_id", "") == app.name]
    assert methods.index("RemoveContainer") > len(methods) - 1 - methods[::-1].index("ReadStdout")


async def test_streams_that_stand_still_hold_up_no_verb(
    containerd: FakeContainerd, agent: FakeAgent, name: str
) -> None:
    """Nobody reads stdout, and a second writer keeps stdin open after `CloseIO`."""
    shim = await started(containerd, name, shell("yes & exec cat >&2"), "stdin", "stdout", "stderr")
    with FifoEnd.writer(fifo(shim, "stdin")), FifoEnd.writer(fifo(shim, "stdin")) as stdin:
        await stdin.write(b"read")
        await shim.call("CloseIO", stdin=True)
        with FifoEnd.reader(fifo(shim, "stderr")) as stderr:
            assert await stderr.read_exactly(4) == b"read"
        async with asyncio.timeout(2):
            await shim.call("State")
            await shim.call("Stats")
            await shim.exec("e", shell("exit 4"))
            await shim.call("Start", exec_id="e")
            assert (await shim.call("Wait", exec_id="e")).exit_status == 4
            await shim.call("Delete", exec_id="e")
            await shim.call("Kill", signal=9)
            assert (await shim.call("Wait")).exit_status == 137

"""Helper programs: what they get, and that they are gone when they must be. Real processes, no VM."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor.errors import HostUnsupported, ProgramNotFound
from hypervisor.process import Process, ProcessExit, spawned

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
SLEEP = ["sleep", "1000"]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def watched(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def ends_within(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


async def said(process: Process, count: int = 1) -> list[str]:
    """The first lines of a program that keeps running."""
    async with asyncio.timeout(10):
        while len(lines := process.output_tail()) < count:
            await asyncio.sleep(0.005)
    return lines


def python(code: str) -> list[str]:
    return [sys.executable, "-ISc", code]


@pytest.mark.parametrize(
    ("argv", "exit", "text"),
    [
        (["true"], ProcessExit(0, None), "exit status 0"),
        (["sh", "-c", "exit 7"], ProcessExit(7, None), "exit status 7"),
        (["sh", "-c", "kill -SEGV $$"], ProcessExit(None, signal.SIGSEGV), "killed by SIGSEGV"),
    ],
)
async def test_exit_is_told(argv: list[str], exit: ProcessExit, text: str) -> None:
    async with spawned(argv) as process:
        assert await process.wait() == exit
    assert str(exit) == text


def test_unknown_signals_have_a_text() -> None:
    assert str(ProcessExit.from_returncode(-63)) == "killed by signal 63"


async def test_leaving_the_block_ends_the_program() -> None:
    async with spawned(SLEEP) as process:
        assert not gone(process.pid)
    assert gone(process.pid)
    assert process.exited.result() == ProcessExit(None, signal.SIGKILL)


async def test_an_error_in_the_block_ends_the_program() -> None:
    with pytest.raises(LookupError):
        async with spawned(SLEEP) as process:
            raise LookupError
    assert gone(process.pid)


async def test_a_program_may_end_itself_within_its_grace() -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(3)); print('up', flush=True); signal.pause()"
    async with spawned(python(code), grace_s=10) as process:
        await said(process)
    assert process.exited.result() == ProcessExit(3, None)


async def test_a_program_that_ignores_sigterm_is_killed() -> None:
    async with spawned(["sh", "-c", "trap '' TERM; echo up; sleep 1000 & wait"], grace_s=0.05) as process:
        await said(process)
    assert process.exited.result() == ProcessExit(None, signal.SIGKILL)


async def test_being_cancelled_in_the_block_ends_the_program() -> None:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with spawned(SLEEP) as process:
            started.set_result(process.pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    pid = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(pid)


async def test_being_cancelled_while_waiting_for_the_end_cuts_the_grace_short() -> None:
    leaving: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with spawned(["sh", "-c", "trap '' TERM; echo up; sleep 1000 & wait"], grace_s=1000) as process:
            await said(process)
            leaving.set_result(process.pid)

    task = asyncio.create_task(run())
    pid = await leaving
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert gone(pid)


async def test_children_of_the_program_end_with_it() -> None:
    async with spawned(["sh", "-c", "sleep 1000 & echo $!; wait"]) as process:
        child = int((await said(process))[0])
        with watched(child) as pidfd:
            await process_ended(process)
            assert ends_within(pidfd, 5)


async def process_ended(process: Process) -> None:
    process.kill()
    await process.wait()


async def test_output_is_one_bounded_tail() -> None:
    async with spawned(["sh", "-c", "seq 1 5000; seq 5001 9999 >&2; echo last"]) as process:
        await process.wait()
    assert process.output_tail() == [*(str(n) for n in range(9951, 10000)), "last"]


async def test_last_words_are_there_when_the_exit_is() -> None:
    for _ in range(20):
        async with spawned(["sh", "-c", "echo why >&2; exit 1"]) as process:
            await process.wait()
            assert process.output_tail() == ["why"]


async def test_who_holds_the_output_open_does_not_delay_the_exit() -> None:
    async with spawned(["sh", "-c", "setsid sleep 1000 & echo $!"]) as process:
        await asyncio.wait_for(process.wait(), 5)
        (orphan,) = process.output_tail()
    os.kill(int(orphan), signal.SIGKILL)


async def test_surroundings_of_a_program() -> None:
    code = (
        "import os; stdin = os.readlink('/proc/self/fd/0'); "
        "print(sorted(os.environ), os.getcwd(), stdin, os.getsid(0) == os.getpid())"
    )
    async with spawned(python(code)) as process:
        await process.wait()
    assert process.output_tail() == ["['LANG', 'PATH'] / /dev/null True"]


async def test_only_named_descriptors_are_inherited() -> None:
    with open("/dev/null", "rb") as given, open("/dev/null", "rb") as withheld:
        os.set_inheritable(withheld.fileno(), True)
        async with spawned(["ls", "/proc/self/fd"], fds=[given.fileno()]) as process:
            await process.wait()
        listing = {int(line) for line in process.output_tail()}
        assert given.fileno() in listing
        assert withheld.fileno() not in listing
    assert len(listing) == 5  # the three standard ones, the given one, the folder ls reads


async def test_no_descriptor_of_ours_is_left() -> None:
    async def round_trip() -> None:
        async with spawned(["true"]) as process:
            await process.wait()
        with pytest.raises(ProgramNotFound):
            async with spawned(["/nonexistent/program"]):
                pass

    await round_trip()
    before = os.listdir("/proc/self/fd")
    await round_trip()
    assert os.listdir("/proc/self/fd") == before


async def test_missing_program(tmp_path: Path) -> None:
    with pytest.raises(ProgramNotFound, match=r"cannot start /nonexistent/qemu: No such file or directory; "):
        async with spawned(["/nonexistent/qemu"]):
            pass
    plain = tmp_path / "not-executable"
    plain.touch(mode=0o644)
    with pytest.raises(ProgramNotFound, match="Permission denied"):
        async with spawned([str(plain)]):
            pass


async def test_missing_network_namespace() -> None:
    with pytest.raises(HostUnsupported, match="cannot open network namespace /nonexistent/ns: No such file"):
        async with spawned(SLEEP, netns=Path("/nonexistent/ns")):
            pass


async def test_not_a_network_namespace() -> None:
    with pytest.raises(HostUnsupported, match="cannot enter network namespace /dev/null for sleep"):
        async with spawned(SLEEP, netns=Path("/dev/null")):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="entering a namespace needs root")
async def test_network_namespace() -> None:
    show = "import os; print(os.readlink('/proc/self/ns/net'), flush=True); input()"
    read, write = os.pipe()
    with open(write, "w"), open(read):
        holder_argv = ["unshare", "--net", "sh", "-c", "readlink /proc/self/ns/net; exec sleep 1000"]
        async with spawned(holder_argv) as holder:
            (theirs,) = await said(holder)
            async with spawned(python(show), netns=Path(f"/proc/{holder.pid}/ns/net")) as process:
                await process.wait()
    assert process.output_tail()[0] == theirs
    assert theirs != os.readlink("/proc/self/ns/net")


KEEPER = """
import asyncio, sys
from hypervisor.process import spawned
async def main():
    async with spawned(["sleep", "1000"]) as process:
        print(process.pid, file=sys.stderr, flush=True)
        await process.wait()
asyncio.run(main())
"""


def test_a_program_dies_when_we_are_killed() -> None:
    argv = [sys.executable, "-c", KEEPER]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as keeper:
        try:
            assert keeper.stderr is not None
            helper = int(keeper.stderr.readline())
            with watched(helper) as pidfd:
                assert not ends_within(pidfd, 0)
                keeper.kill()
                assert ends_within(pidfd, 5)
        finally:
            keeper.kill()


def test_a_child_whose_parent_is_already_gone_does_not_start() -> None:
    code = "from hypervisor.process import _child_setup; _child_setup({parent}, None)(); print('started')"

    def start(parent: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", "import os; " + code.format(parent=parent)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)

    alive, orphaned = start("os.getppid()"), start("os.getppid() + 1")
    assert (alive.returncode, alive.stdout) == (0, "started\n")
    assert (orphaned.returncode, orphaned.stdout) == (1, "")

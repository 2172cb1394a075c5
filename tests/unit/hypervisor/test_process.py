"""Helper programs: what they get, and that they are gone when they must be. Real processes, no VM."""

from __future__ import annotations

import asyncio
import errno
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
from hypervisor.rootless import User

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
@pytest.mark.parametrize("user", [None, User(uid=12345, gid=12345)], ids=["as us", "as another user"])
async def test_network_namespace(user: User | None) -> None:
    show = ["readlink", "/proc/self/ns/net"]
    read, write = os.pipe()
    with open(write, "w"), open(read):
        holder_argv = ["unshare", "--net", "sh", "-c", "readlink /proc/self/ns/net; exec sleep 1000"]
        async with spawned(holder_argv) as holder:
            (theirs,) = await said(holder)
            async with spawned(show, netns=Path(f"/proc/{holder.pid}/ns/net"), user=user) as process:
                await process.wait()
    assert process.output_tail()[0] == theirs
    assert theirs != os.readlink("/proc/self/ns/net")


async def test_a_program_that_cannot_be_watched_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        refused.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    refused: list[int] = []
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            async with spawned(SLEEP):
                pass
    assert [gone(pid) for pid in refused] == [True]
    assert os.listdir("/proc/self/fd") == before


KEEPER = """
import asyncio, sys
from hypervisor.process import spawned
from hypervisor.rootless import User
user = User(uid=int(sys.argv[1]), gid=12345) if sys.argv[1:] else None
async def main():
    async with spawned(["sleep", "1000"], user=user) as process:
        print(process.pid, file=sys.stderr, flush=True)
        await process.wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("user", [[], ["12345"]], ids=["as us", "as another user"])
def test_a_program_dies_when_we_are_killed(user: list[str]) -> None:
    if user and os.geteuid() != 0:
        pytest.skip("only root starts programs as others")
    argv = [sys.executable, "-c", KEEPER, *user]
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
    code = "from hypervisor.process import _child_setup; _child_setup({parent}, (), {{}})(); print('started')"

    def start(parent: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", "import os; " + code.format(parent=parent)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)

    alive, orphaned = start("os.getppid()"), start("os.getppid() + 1")
    assert (alive.returncode, alive.stdout) == (0, "started\n")
    assert (orphaned.returncode, orphaned.stdout) == (1, "")


async def test_descriptors_by_the_numbers_that_the_program_expects() -> None:
    """Also when one of ours already has a number that another of them shall get."""
    first, second = os.memfd_create("first"), os.memfd_create("second")
    try:
        low = min(first, second)
        names = "(os.readlink(f'/proc/self/fd/{n}').split()[0] for n in (3, 4, 5))"
        code = f"import os; print(*{names}, os.environ['WORD'])"
        given = {3: second, 4: first, 5: low}
        async with spawned(python(code), renumbered=given, environment={"WORD": "told"}) as process:
            await process.wait()
        assert process.output_tail() == ["/memfd:second /memfd:first /memfd:first told"]
    finally:
        os.close(first)
        os.close(second)


@pytest.mark.skipif(os.getuid() != 0, reason="needs capabilities to keep")
@pytest.mark.parametrize("keeps", [True, False])
async def test_capabilities_of_another_user(keeps: bool) -> None:
    code = (
        "import os; os.setresuid(-1, 1000, -1); "
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')))"
    )
    async with spawned(python(code), keep_capabilities=keeps) as process:
        await process.wait()
    assert (int(process.output_tail()[0], 16) != 0) is keeps


@pytest.mark.skipif(os.getuid() != 0, reason="only root starts programs as others")
@pytest.mark.parametrize("groups", [(), (77, 78)])
async def test_a_program_as_another_user_can_do_nothing_more(groups: tuple[int, ...]) -> None:
    user = User(uid=1879048193, gid=1879048194, groups=groups)
    wanted = "^(Uid|Gid|Groups|Cap[A-Z]..|NoNewPrivs):"
    async with spawned(["grep", "-E", wanted, "/proc/self/status"], user=user) as process:
        assert await process.wait() == ProcessExit(0, None)
    parts = (line.partition(":") for line in process.output_tail())
    status = {name: value.strip() for name, _, value in parts}
    assert status["Uid"].split() == ["1879048193"] * 4
    assert status["Gid"].split() == ["1879048194"] * 4
    assert status["Groups"].split() == [str(group) for group in groups]
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


@pytest.mark.skipif(os.getuid() != 0, reason="only root starts programs as others")
async def test_a_user_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ids: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "setresuid", refuse)
    words = "cannot run true as user 7: Invalid argument; the shim has to be root of the host"
    with pytest.raises(HostUnsupported, match=words):
        async with spawned(["true"], user=User(uid=7, gid=7)):
            pass


async def test_the_label_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SELinux the kernel's file for it refuses; a file of ours shows what would be written."""
    file = tmp_path / "exec"
    file.touch()
    monkeypatch.setattr("hypervisor.process._NEXT_LABEL", str(file))
    async with spawned(["true"], selinux_label="system_u:system_r:container_kvm_t:s0") as process:
        assert await process.wait() == ProcessExit(0, None)
    assert file.read_text() == "system_u:system_r:container_kvm_t:s0"
    file.unlink()
    words = "cannot run true with SELinux label a:b:c: No such file or directory; the host's policy has to have it"
    with pytest.raises(HostUnsupported, match=words):
        async with spawned(["true"], selinux_label="a:b:c"):
            pass

"""The reaper with real children."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from guest_agent.reaper import Reaper, exit_code


def child(code: int = 0, *, signal_number: int = 0) -> int:
    script = f"kill -{signal_number} $$" if signal_number else f"exit {code}"
    return os.posix_spawn("/bin/sh", ["sh", "-c", script], {})


@pytest.mark.parametrize("code", [0, 1, 255])
async def test_exit_codes(reaper: Reaper, code: int) -> None:
    assert await reaper.watch(child(code)) == code


async def test_death_by_signal(reaper: Reaper) -> None:
    assert await reaper.watch(child(signal_number=signal.SIGKILL)) == 137
    assert await reaper.watch(child(signal_number=signal.SIGTERM)) == 143


async def test_many_at_once(reaper: Reaper) -> None:
    futures = [reaper.watch(child(code)) for code in range(20)]
    assert await asyncio.gather(*futures) == list(range(20))


def dead(code: int) -> int:
    """A child that has exited and that nobody has waited for."""
    pid = child(code)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def test_a_process_that_dies_before_its_pid_is_known(reaper: Reaper) -> None:
    with reaper.births():
        pid = dead(7)
        reaper.reap()
        assert await reaper.watch(pid) == 7


async def test_nested_births(reaper: Reaper) -> None:
    with reaper.births():
        pid = dead(3)
        reaper.reap()
        with reaper.births():
            pass
        assert await reaper.watch(pid) == 3


async def test_old_statuses_are_not_given_to_new_processes(reaper: Reaper) -> None:
    pid = dead(3)
    reaper.reap()  # nobody expects a birth: an orphan
    with reaper.births():
        assert not reaper.watch(pid).done()
    with reaper.births():
        other = dead(4)
        reaper.reap()
    with reaper.births():
        assert not reaper.watch(other).done()


async def test_unknown_statuses_are_bounded(reaper: Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_agent.reaper.MAX_UNKNOWN", 2)
    with reaper.births():
        pids = []
        for code in (1, 2, 3):
            pids.append(dead(code))
            reaper.reap()
        done = [reaper.watch(pid).done() for pid in pids]
    assert done == [False, True, True]


async def test_nobody_has_to_wait_any_more(reaper: Reaper) -> None:
    reaper.watch(pid := child(0)).cancel()
    with suppress(ChildProcessError):  # which says that it has been reaped by now
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    other = reaper.watch(child(5))
    assert await other == 5
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@pytest.mark.parametrize(("status", "code"), [(0x0300, 3), (9, 137), (0x0000, 0), (0x008B, 139)])
def test_wait_statuses(status: int, code: int) -> None:
    assert exit_code(status) == code


SUBREAPER = """
import asyncio, os, sys, time
from guest_agent.reaper import Reaper
from tests.support import host

async def main():
    host.adopt_orphans()
    reaper = Reaper()
    reaper.start()
    reading, writing = os.pipe()
    with reaper.births():
        # The middle process ends at once; its child, our orphan, tells its pid and exits with 42.
        script = "(sleep 0.05; exit 42) & echo $! >&%d" % writing
        os.set_inheritable(writing, True)
        middle = os.posix_spawn("/bin/sh", ["sh", "-c", script], dict(os.environ))
        assert await reaper.watch(middle) == 0
        orphan = int(os.read(reading, 100).split()[0])
        assert await reaper.watch(orphan) == 42
    print("reaped")

asyncio.run(main())
"""


def test_orphans_become_our_children() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBREAPER],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3], timeout=15,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "reaped\n", "")

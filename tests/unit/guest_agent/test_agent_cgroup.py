"""Signals to a whole cgroup and the list of its processes; the kernel's files are plain ones, the processes real."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_agent.cgroup import MAX_SIGNAL_ROUNDS, Cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Sleeper = Callable[[], int]


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Starts processes that last until they are signalled; the test's end kills what it left."""
    pids: list[int] = []

    def start() -> int:
        pids.append(os.posix_spawnp("sleep", ["sleep", "1000"], dict(os.environ)))
        return pids[-1]

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # a zombie takes it too
        os.waitpid(pid, 0)


@pytest.fixture
def cgroup(tmp_path: Path) -> Cgroup:
    group = Cgroup("c1", str(tmp_path))
    os.makedirs(f"{group.path}/inner/deep")
    return group


def put(cgroup: Cgroup, *pids: int, below: str = "") -> None:
    Path(cgroup.path, below, "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


def ended_by(pid: int) -> int:
    """The signal that ended a child, without taking its status away from the fixture."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert info is not None
    return info.si_status


def runs(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None


def test_processes_are_those_of_the_group_and_below(cgroup: Cgroup) -> None:
    put(cgroup, 7, 9)
    put(cgroup, 11, below="inner/deep")
    assert cgroup.pids() == [7, 9, 11]
    assert Cgroup("gone", cgroup.path).pids() == []


def test_a_signal_reaches_every_process(cgroup: Cgroup, sleeper: Sleeper) -> None:
    above, below, other = sleeper(), sleeper(), sleeper()
    put(cgroup, above)
    put(cgroup, below, below="inner")
    cgroup.signal(signal.SIGUSR1)
    assert [ended_by(above), ended_by(below)] == [signal.SIGUSR1] * 2
    assert runs(other)


def test_a_process_that_was_forked_meanwhile_gets_it_too(
    cgroup: Cgroup, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = sleeper(), sleeper()
    put(cgroup, parent)
    kill = os.kill

    def fork_then_take(pid: int, number: int) -> None:
        if pid == parent:
            put(cgroup, parent, child)
        kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", fork_then_take)
        cgroup.signal(signal.SIGTERM)
    assert ended_by(child) == signal.SIGTERM


def test_a_signal_answered_by_forking_comes_to_an_end(
    cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled: list[int] = []

    def fork_again(pid: int, number: int) -> None:
        signalled.append(pid)
        put(cgroup, pid, pid + 1)

    put(cgroup, 1000)
    monkeypatch.setattr(os, "kill", fork_again)
    cgroup.signal(signal.SIGHUP)
    assert signalled == list(range(1000, 1000 + MAX_SIGNAL_ROUNDS))


def test_a_process_that_is_gone_does_not_keep_it_from_the_others(cgroup: Cgroup, sleeper: Sleeper) -> None:
    gone, here = os.posix_spawnp("true", ["true"], dict(os.environ)), sleeper()
    os.waitpid(gone, 0)
    put(cgroup, gone, here)
    cgroup.signal(signal.SIGTERM)
    assert ended_by(here) == signal.SIGTERM


def test_killing_is_the_kernels_work_where_it_can(cgroup: Cgroup, sleeper: Sleeper) -> None:
    pid = sleeper()
    put(cgroup, pid)
    control = Path(cgroup.path, "cgroup.kill")
    control.touch()
    cgroup.signal(signal.SIGKILL)
    assert control.read_text() == "1"
    assert runs(pid)
    control.unlink()
    cgroup.signal(signal.SIGKILL)
    assert ended_by(pid) == signal.SIGKILL

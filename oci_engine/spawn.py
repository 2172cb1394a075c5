"""Starts the process of a plan: the caller's side of the fork.

A fork of an interpreter is expensive: its tables are copied at once, and then every page that is touched on either
side. Where a thread can take the namespaces, there is only one fork, and no process in between to be talked to.
"""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread

from oci_engine import channel, child, linux
from oci_engine.c_modules import signal
from oci_engine.errors import SetupFailed
from oci_engine.steps import reason
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_engine.linux_spec import IdMapping
    from oci_engine.plan import NamespacePlan, Plan
    from oci_engine.waiting import Wait


class Spawned:
    """The new process, which waits until `go_on` at each of its stops."""

    def __init__(self, pid: int, fd: int, wait: Wait) -> None:
        self.pid = pid
        self._channel = fd
        self._wait = wait

    def go_on(self) -> None:
        channel.send(self._channel, event="go")

    def wait_for(self, event: str) -> dict[str, object]:
        """What it says then. Raises what it failed with; SetupFailed when it ended without a word."""
        try:
            message = channel.receive(self._channel)
        except channel.Closed:
            raise SetupFailed("the container's process ended while it was being set up") from None
        if message["event"] != event:
            raise SetupFailed(f"the container's process said {message['event']!r} instead of {event!r}")
        return message

    def wait_for_exec(self) -> None:
        """Returns when the program runs. Raises what kept it from that."""
        with suppress(channel.Closed):
            channel.receive(self._channel)

    def kill(self) -> None:
        """End it, and reap it: it is a child of this process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            self._wait(self.pid)

    def close(self) -> None:
        """Say no more to it."""
        os.close(self._channel)


def spawn(
    make_plan: Callable[[int], Plan],
    *,
    placed: Callable[[int], None],
    wait: Wait,
    uid_mappings: tuple[IdMapping, ...] = (),
    gid_mappings: tuple[IdMapping, ...] = (),
    oom_score_adj: int | None = None,
) -> Spawned:
    """Fork. `make_plan` gets the child's end of the channel; `placed` puts a process into its cgroup.

    The process is a child of the caller's, stopped with its namespaces made and nothing else done. It can be seen from
    inside of them: so that nobody there looks into its memory, nobody without the rights for that can look into the
    caller's any more.
    """
    ours, theirs = channel.pair()
    try:
        plan = make_plan(theirs)
        alone = _needs_single_thread(plan.namespaces)
        first = _fork(plan) if alone else _fork_inside(plan)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    try:
        _place(first, placed, oom_score_adj)
        pid = _guide(first, ours, plan, uid_mappings, gid_mappings, wait) if alone else first
    except BaseException:
        os.close(ours)  # which ends it, wherever it waits
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        _collect(first, wait)
        raise
    if alone:
        _collect(first, wait)
    return Spawned(pid, ours, wait)


def _collect(pid: int, wait: Wait) -> None:
    with suppress(ChildProcessError):
        wait(pid)


def _needs_single_thread(namespaces: NamespacePlan) -> bool:
    kinds = namespaces.unshared
    for _, kind in namespaces.joined:
        kinds |= kind
    return bool(kinds & (linux.CLONE_NEWUSER | linux.CLONE_NEWTIME))


def _fork_inside(plan: Plan) -> int:
    """From a thread that has gone into the namespaces, and ends there. Raises what kept it from that."""
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    pids: list[int] = []
    problems: list[BaseException] = []
    done = allocate_lock()
    done.acquire()

    def fork() -> None:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            child.enter(plan)
            pid = os.fork()
            if pid == 0:
                child.run_inside(plan)
            pids.append(pid)
            # What the process has, and nobody else may: that it closes something must be seen.
            linux.close_range(0)
        except BaseException as err:
            problems.append(err)
        finally:
            done.release()

    start_new_thread(fork, ())
    done.acquire()
    if problems:
        raise problems[0]
    return pids[0]


def _fork(plan: Plan) -> int:
    """With all signals blocked: none may be answered in the child by the caller's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            child.run(plan)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _place(pid: int, placed: Callable[[int], None], oom_score_adj: int | None) -> None:
    placed(pid)
    if oom_score_adj is not None:
        _set_oom_score(pid, oom_score_adj)


def _guide(
    first: int,
    fd: int,
    plan: Plan,
    uid_mappings: tuple[IdMapping, ...],
    gid_mappings: tuple[IdMapping, ...],
    wait: Wait,
) -> int:
    try:
        channel.send(fd, event="go")
        if uid_mappings or gid_mappings:
            _expect(fd, "user")
            _map_ids(first, "uid", uid_mappings, wait)
            _map_ids(first, "gid", gid_mappings, wait)
            channel.send(fd, event="go")
        if plan.namespaces.time_offsets:
            _expect(fd, "time")
            _write(first, "timens_offsets", plan.namespaces.time_offsets, "linux.timeOffsets")
            channel.send(fd, event="go")
        return int(str(_expect(fd, "forked")["pid"]))
    except channel.Closed:
        raise SetupFailed("linux.namespaces: the process that makes them ended without a word") from None


def _expect(fd: int, event: str) -> dict[str, object]:
    message = channel.receive(fd)
    if message.get("event") != event:
        raise SetupFailed(f"the container's process said {message.get('event')!r} instead of {event!r}")
    return message


def _set_oom_score(pid: int, value: int) -> None:
    try:
        _write(pid, "oom_score_adj", str(value), "process.oomScoreAdj")
    except SetupFailed:
        if os.geteuid() == 0:
            raise
        # Only the host's root may make a process less likely to be ended; for others it stays as it is.


def _map_ids(pid: int, kind: str, mappings: tuple[IdMapping, ...], wait: Wait) -> None:
    """`kind` is uid or gid. Others than root may map themselves alone, and what newuidmap(1) grants them."""
    place = f"linux.{kind}Mappings"
    own = {"uid": os.geteuid, "gid": os.getegid}[kind]()
    if os.geteuid() == 0:
        _write(pid, f"{kind}_map", map_text(mappings), place)
    elif [(each.host, each.size) for each in mappings] == [(own, 1)]:
        if kind == "gid":
            # Else it could leave a group that a file's mode keeps out.
            _write(pid, "setgroups", "deny", place)
        _write(pid, f"{kind}_map", map_text(mappings), place)
    else:
        program = f"new{kind}map"
        words = [program, str(pid), *map_text(mappings).split()]
        try:
            done = wait(os.posix_spawnp(program, words, os.environ))
        except (FileNotFoundError, PermissionError):  # the latter by a folder of PATH that is closed
            raise SetupFailed(
                f"{place}: there is no {program} to map other ids than one's own; install uidmap"
            ) from None
        if done != 0:
            raise SetupFailed(
                f"{place}: {program} ended with status {done}; do /etc/sub{kind} and the mappings agree?"
            )


def map_text(mappings: tuple[IdMapping, ...]) -> str:
    """As the kernel takes it, in /proc/PID/uid_map."""
    return "".join(f"{each.container} {each.host} {each.size}\n" for each in mappings)


def _write(pid: int, file: str, text: str, place: str) -> None:
    try:
        fd = os.open(f"/proc/{pid}/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as err:
        raise SetupFailed(f"{place}: {reason(err)}") from None

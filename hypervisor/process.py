"""`spawned()`: the only place that starts programs of the host: QEMU, virtiofsd, and what hooks and loggers name.

What a helper can rely on, and what it cannot do:

- It dies with us, also when we are killed with SIGKILL: the child asks the kernel for PR_SET_PDEATHSIG before
  it executes the program, and leaves at once if we died before it could ask. The signal belongs to the
  *thread* that started the child, so this must run on a thread that lives as long as the program is wanted:
  the event loop's.
- It inherits the file descriptors named in `fds`, under their numbers, and no others. stdin is /dev/null unless it is
  given something to read.
- stdout and stderr are one pipe, of which the last lines are kept (`hypervisor.tail`). The environment is
  minimal.
- It may run as another user, who then is nothing but that: no capabilities, and no way to new ones.
- It leads its own session, so a signal to our process group does not take it away under our feet, and
  its own children are reached by killing its group.
- Leaving the block means it is gone and reaped, whatever happened meanwhile.

Why like this: `preexec_fn` is safe here, because what it calls takes no lock that another thread of the daemon might
hold at the fork. It makes a start cost a full fork (2.5 ms) instead of a vfork (0.3 ms); a program in between that sets
the signal (setpriv) would cost the same in the end, and could not tell that we died before it ran. The end of a process
is watched through its pidfd on the event loop; asyncio's own subprocesses cost a thread each on Python 3.11.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import structlog

from hypervisor.errors import SHORTAGES, HostUnsupported, ProgramNotFound
from hypervisor.netns import CLONE_NEWNET, open_netns
from hypervisor.tail import LineTail
from hypervisor.waiting import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path
    from typing import TypeAlias

    from hypervisor.rootless import User

    # What is done, what to do about its failure, and the deed, which raises OSError.
    _Step: TypeAlias = tuple[str, str, Callable[[], None]]

log = structlog.get_logger(__name__)

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_READ_BYTES = 65536
# <linux/prctl.h> and <linux/sched.h>
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
_CLONE_NEWNS = 0x20000
_SECBIT_NO_SETUID_FIXUP = 1 << 2  # <linux/securebits.h>
_LOCKING_REMEDY = "the shim needs CAP_SYS_RESOURCE, or a greater limit (LimitMEMLOCK of containerd's unit)"
# What a program that is executed next gets as its SELinux label.
_NEXT_LABEL = "/proc/thread-self/attr/exec"


@dataclass(frozen=True)
class ProcessExit:
    """How a program ended: an exit status or the signal that killed it; the other one is None."""

    status: int | None
    signal: int | None

    @classmethod
    def from_returncode(cls, returncode: int) -> ProcessExit:
        """From `subprocess`'s convention: negative numbers are signals."""
        return cls(None, -returncode) if returncode < 0 else cls(returncode, None)

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.status}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(self.signal).name}"
        return f"killed by signal {self.signal}"


class Process:
    """A running helper program. `exited` is set once; it is never cancelled by those who wait for it.

    Both descriptors, the program's output and its pidfd, are closed here.
    """

    def __init__(
        self, argv: Sequence[str], popen: subprocess.Popen[bytes], output_fd: int, pidfd: int
    ) -> None:
        self.argv = argv
        self.program = argv[0]
        self.pid = popen.pid
        self.exited: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()
        self._popen = popen
        self._tail = LineTail()
        self._output_fd: int | None = output_fd
        self._pidfd = pidfd
        loop = asyncio.get_running_loop()
        loop.add_reader(output_fd, self._read_output)
        loop.add_reader(pidfd, self._on_exit)

    def output_tail(self) -> list[str]:
        """The last lines of stdout and stderr, oldest first."""
        return self._tail.lines()

    def send_signal(self, number: int) -> None:
        """Signal the program and its children; nothing happens when it is gone."""
        if not self.exited.done():
            # Not reaped yet (only _on_exit does that), so the number still belongs to this process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> ProcessExit:
        """Wait for the end. Cancelling the wait leaves `exited` alone."""
        await asyncio.wait([self.exited])
        return self.exited.result()

    def _read_output(self) -> bool:
        """Read once; return whether there may be more."""
        if self._output_fd is None:
            return False
        try:
            data = os.read(self._output_fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_output()
            return False
        for line in self._tail.feed(data):
            log.debug("program_said", program=self.program, pid=self.pid, line=line)
        return True

    def _close_output(self) -> None:
        if self._output_fd is not None:
            asyncio.get_running_loop().remove_reader(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = None

    def _on_exit(self) -> None:
        returncode = self._popen.wait()  # the pidfd is readable: it does not block
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Last words first, so that who sees the exit also sees the reason. A child of the program may hold
        # the pipe open and keep writing: a pipe's worth is all we take.
        for _ in range(_READ_BYTES // 4096):
            if not self._read_output():
                break
        self._close_output()
        result = ProcessExit.from_returncode(returncode)
        log.debug("program_exited", program=self.program, pid=self.pid, exit=str(result))
        self.exited.set_result(result)


@asynccontextmanager
async def spawned(
    argv: Sequence[str],
    *,
    fds: Sequence[int] = (),
    renumbered: Mapping[int, int] = MappingProxyType({}),
    environment: Mapping[str, str] = MappingProxyType({}),
    program: str = "",
    stdin: int | None = None,
    mounts: int | None = None,
    netns: Path | None = None,
    keep_capabilities: bool = False,
    user: User | None = None,
    selinux_label: str = "",
    locked_bytes: int = 0,
    grace_s: float = 0,
) -> AsyncIterator[Process]:
    """Run a program for the length of the block.

    It gets the descriptors `fds` by their numbers here, and those of `renumbered` by the keys' numbers, which are
    not 0 to 2; `environment` is added to a plain one. `program` is the file to execute, when that is not `argv`'s first
    word; `stdin` is what it reads, `mounts` a descriptor of a mount namespace for it. With `keep_capabilities` it has
    those of root also while it acts as another user. With `user` it runs as that one from its beginning, with
    `selinux_label` under that label; with `locked_bytes` it may lock that much memory without root's rights.

    Leaving the block sends SIGTERM, SIGKILL `grace_s` seconds later (at once when 0), and waits for the end.
    Being cancelled there cuts the grace short and is passed on after the program is gone.

    Raises ProgramNotFound, or HostUnsupported when the network namespace cannot be entered, the user or the label
    cannot be had.
    """
    steps: list[_Step] = []
    if mounts is not None:
        steps.append(_seeing(argv[0], mounts))
    if selinux_label:
        steps.append(_labelled(argv[0], selinux_label))
    if locked_bytes:
        steps.append(_locking(argv[0], locked_bytes))
    if keep_capabilities:
        steps.append(_keeping_capabilities(argv[0]))
    if user is not None:
        steps.append(_become(argv[0], user))
    process = _start(_What(argv, program or argv[0], environment, stdin), fds, renumbered, netns, steps)
    try:
        yield process
    finally:
        await _end(process, grace_s)


class _What(NamedTuple):
    """What is executed."""

    argv: Sequence[str]
    program: str
    environment: Mapping[str, str]
    stdin: int | None


def _start(
    what: _What,
    fds: Sequence[int],
    renumbered: Mapping[int, int],
    netns: Path | None,
    steps: Sequence[_Step],
) -> Process:
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, output_read)
        os.set_blocking(output_read, False)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, output_write)
            if netns is not None:
                netns_fd = open_netns(netns)
                stack.callback(os.close, netns_fd)
                steps = [_entering(what.program, netns, netns_fd), *steps]
            renumbered = _out_of_the_way(renumbered, stack)
            setup = _child_setup(os.getpid(), steps, renumbered)
            try:
                popen = _popen(what, (*fds, *renumbered), output_write, setup)
            except subprocess.SubprocessError as err:  # in setup, which has written the reason
                raise HostUnsupported(os.read(output_read, _READ_BYTES).decode()) from err
        log.debug("program_started", pid=popen.pid, argv=list(what.argv))
        undo.callback(_kill_unwatched, popen)
        process = Process(what.argv, popen, output_read, os.pidfd_open(popen.pid))
        undo.pop_all()
    return process


def _kill_unwatched(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    popen.wait()


def _popen(
    what: _What, fds: Sequence[int], output_fd: int, child_setup: Callable[[], None]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            what.argv,
            executable=what.program,
            stdin=subprocess.DEVNULL if what.stdin is None else what.stdin,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=tuple(fds),
            env={**_ENVIRONMENT, **what.environment},
            cwd="/",
            start_new_session=True,
            preexec_fn=child_setup,  # see the module's docstring
        )
    except OSError as err:
        if err.errno in SHORTAGES:
            raise OSError(err.errno, f"cannot start {what.program}: {err.strerror}") from err
        remedy = "install it or correct its path in the configuration"
        raise ProgramNotFound(what.program, err.strerror or str(err), remedy) from err


def _out_of_the_way(renumbered: Mapping[int, int], stack: contextlib.ExitStack) -> dict[int, int]:
    """Copies of the descriptors, above all numbers that they shall have in the program; they go with `stack`.

    Until then every one of those numbers is taken here, so that none of `subprocess`'s own pipes can get it.
    """
    if not renumbered:
        return {}
    top = max(renumbered) + 1
    copies = {}
    for number, fd in renumbered.items():
        copies[number] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, top)
        stack.callback(os.close, copies[number])
    lowest_free = 0
    while lowest_free < top:
        lowest_free = os.dup(copies[number])
        stack.callback(os.close, lowest_free)
    return copies


def _child_setup(parent: int, steps: Sequence[_Step], renumbered: Mapping[int, int]) -> Callable[[], None]:
    """What the child does between fork and exec. Everything it calls is looked up here, before the fork.

    A step that fails is written to the program's output, since all that `subprocess` passes on is that one did.
    """
    prctl = ctypes.CDLL(None).prctl

    def setup() -> None:
        for what, remedy, do in steps:
            try:
                do()
            except OSError as err:
                os.write(2, f"{what}: {err.strerror}; {remedy}".encode())
                raise
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # becoming another user has cleared an earlier wish
        if os.getppid() != parent:
            os._exit(1)  # our parent died before the kernel knew of our wish
        for number, fd in renumbered.items():
            os.dup2(fd, number)

    return setup


def _entering(program: str, netns: Path, fd: int) -> _Step:
    setns = ctypes.CDLL(None, use_errno=True).setns

    def enter() -> None:
        if setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    what = f"cannot enter network namespace {netns} for {program}"
    return what, "the caller needs CAP_SYS_ADMIN over it", enter


def _seeing(program: str, mounts: int) -> _Step:
    setns = ctypes.CDLL(None, use_errno=True).setns

    def see() -> None:
        if setns(mounts, _CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return f"cannot enter the mount namespace for {program}", "the caller needs CAP_SYS_ADMIN", see


def _labelled(program: str, label: str) -> _Step:
    def wish() -> None:
        fd = os.open(_NEXT_LABEL, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, label.encode())
        os.close(fd)

    what = f"cannot run {program} with SELinux label {label}"
    return what, "the host's policy has to have it; correct selinux_label or set disable_selinux", wish


def _locking(program: str, locked_bytes: int) -> _Step:
    from hypervisor.locked_memory import allow

    what = f"cannot let {program} lock {locked_bytes >> 20} MiB of memory, for devices of the host"
    return what, _LOCKING_REMEDY, partial(allow, locked_bytes)


def _keeping_capabilities(program: str) -> _Step:
    prctl = ctypes.CDLL(None).prctl

    def keep() -> None:
        prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)

    return f"cannot keep capabilities for {program}", "the caller needs CAP_SETPCAP", keep


def _become(program: str, user: User) -> _Step:
    prctl = ctypes.CDLL(None).prctl

    def become() -> None:
        capability = 0
        while prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    what = f"cannot run {program} as user {user.uid}"
    return what, "the shim has to be root of the host, or that user be one of its user namespace", become


async def _end(process: Process, grace_s: float) -> None:
    try:
        if grace_s > 0 and not process.exited.done():
            process.send_signal(signal.SIGTERM)
            await asyncio.wait([process.exited], timeout=grace_s)
            if not process.exited.done():
                log.warning(
                    "program_ignored_sigterm", program=process.program, pid=process.pid, seconds=grace_s
                )
    finally:
        process.kill()
        await outlast(process.exited)

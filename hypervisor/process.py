"""`spawned()`: the only place that starts helper programs (QEMU, virtiofsd).

What a helper can rely on, and what it cannot do:

- It dies with us, also when we are killed with SIGKILL: the child asks the kernel for PR_SET_PDEATHSIG before
  it executes the program, and leaves at once if we died before it could ask. The signal belongs to the
  *thread* that started the child, so this must run on a thread that lives as long as the program is wanted:
  the event loop's.
- It inherits the file descriptors named in `fds`, under their numbers, and no others. stdin is /dev/null.
- stdout and stderr are one pipe, of which the last lines are kept (`hypervisor.tail`). The environment is
  minimal.
- It leads its own session, so a signal to our process group does not take it away under our feet, and
  its own children are reached by killing its group.
- Leaving the block means it is gone and reaped, whatever happened meanwhile.

Why like this: `preexec_fn` is safe here because the daemon has one thread. It makes a start cost a full fork
(2.5 ms) instead of a vfork (0.3 ms); a program in between that sets the signal (setpriv) would cost the same
in the end, and could not tell that we died before it ran. The end of a process is watched through its pidfd
on the event loop; asyncio's own subprocesses cost a thread each on Python 3.11.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from hypervisor.errors import HostUnsupported, ProgramNotFound
from hypervisor.tail import LineTail
from hypervisor.waiting import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_READ_BYTES = 65536
# <linux/prctl.h> and <linux/sched.h>
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


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
    """A running helper program. `exited` is set once; it is never cancelled by those who wait for it."""

    def __init__(self, program: str, popen: subprocess.Popen[bytes], output_fd: int) -> None:
        self.program = program
        self.pid = popen.pid
        self.exited: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()
        self._popen = popen
        self._tail = LineTail()
        self._output_fd: int | None = output_fd
        self._pidfd = os.pidfd_open(popen.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(output_fd, self._read_output)
        loop.add_reader(self._pidfd, self._on_exit)

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
    argv: Sequence[str], *, fds: Sequence[int] = (), netns: Path | None = None, grace_s: float = 0
) -> AsyncIterator[Process]:
    """Run a program for the length of the block.

    Leaving the block sends SIGTERM, SIGKILL `grace_s` seconds later (at once when 0), and waits for the end.
    Being cancelled there cuts the grace short and is passed on after the program is gone.

    Raises ProgramNotFound, or HostUnsupported when the network namespace cannot be entered.
    """
    process = _start(argv, fds, netns)
    try:
        yield process
    finally:
        await _end(process, grace_s)


def _start(argv: Sequence[str], fds: Sequence[int], netns: Path | None) -> Process:
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, output_write)
            netns_fd = None
            if netns is not None:
                netns_fd = _open_netns(netns)
                stack.callback(os.close, netns_fd)
            popen = _popen(argv, fds, output_write, _child_setup(os.getpid(), netns_fd), netns)
        os.set_blocking(output_read, False)
    except BaseException:
        os.close(output_read)
        raise
    log.debug("program_started", pid=popen.pid, argv=list(argv))
    try:
        return Process(argv[0], popen, output_read)
    except BaseException:  # nobody would watch it
        popen.kill()
        popen.wait()
        raise


def _popen(
    argv: Sequence[str],
    fds: Sequence[int],
    output_fd: int,
    child_setup: Callable[[], None],
    netns: Path | None,
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=tuple(fds),
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            preexec_fn=child_setup,  # one thread: see the module's docstring
        )
    except OSError as err:
        remedy = "install it or correct its path in the configuration"
        raise ProgramNotFound(argv[0], err.strerror or str(err), remedy) from err
    except subprocess.SubprocessError as err:  # all that is known of a failure in child_setup
        raise HostUnsupported(
            f"cannot enter network namespace {netns} for {argv[0]}; the caller needs CAP_SYS_ADMIN over it"
        ) from err


def _open_netns(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise HostUnsupported(
            f"cannot open network namespace {path}: {err.strerror}; does the sandbox exist?"
        ) from err


def _child_setup(parent: int, netns_fd: int | None) -> Callable[[], None]:
    """What the child does between fork and exec. Everything it calls is looked up here, before the fork."""
    libc = ctypes.CDLL(None, use_errno=True)
    prctl, setns = libc.prctl, libc.setns

    def setup() -> None:
        if netns_fd is not None and setns(netns_fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # our parent died before the kernel knew of our wish

    return setup


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

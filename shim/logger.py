"""Loggers: programs of the host that take a process's output, named by a `binary://` URI.

    binary:///usr/bin/log?--tag=web&--verbose&env.LEVEL=info

runs `/usr/bin/log --tag web --verbose ''` with LEVEL in its environment. The contract is that of containerd's runc
shim (its NewBinaryIO and NewBinaryCmd): CONTAINER_ID, which is the exec's id for an exec, and CONTAINER_NAMESPACE are
in the environment, descriptors 3 and 4 are the reading ends of stdout and stderr, and 5 is a pipe by which the logger
says that it is ready. With `binary://` it closes 5; with `binary-v2://`, since containerd 2.2, it writes a byte first,
so that a crash cannot be taken for readiness. Of a parameter that is repeated the first counts.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from hypervisor.errors import ProgramNotFound
from hypervisor.process import spawned
from shim.errors import InvalidRequest
from shim.host_streams import Output, enlarge, ready
from shim.procfs import stat_fields

if TYPE_CHECKING:
    from hypervisor.process import Process
    from shim.host_streams import Uri

SCHEMES = ("binary", "binary-v2")
# containerd's runc shim waits for ever; hcsshim, its counterpart for Windows, as long as this.
_READY_LIMIT_S = 10.0
# How long it may write on after the end of both streams, and then after SIGTERM: together the 12 s of containerd's runc
# shim, which sends SIGTERM at once. A logger that does not handle the signal would die of it with bytes in its pipes.
_FINISH_LIMIT_S = 6.0
_TERMINATE_LIMIT_S = 6.0
_STDOUT, _STDERR, _READY = 3, 4, 5
_ENVIRONMENT_PREFIX = "env."
_PF_EXITING = 0x4  # <linux/sched.h>


class Logger:
    """A running logger with the pipes that it reads, `stdout` and `stderr`. When they end it should end too."""

    def __init__(self, stdout: Output, stderr: Output, process: Process, running: AsyncExitStack) -> None:
        """Use `start`. Leaving `running` ends the process."""
        self.stdout = stdout
        self.stderr = stderr
        self._released = asyncio.Event()
        self._life = asyncio.create_task(self._live(process, running), name=f"logger {process.program}")

    @classmethod
    async def start(cls, uri: Uri, what: str, *, owner: str, namespace: str) -> Logger:
        """Run it and wait until it is ready. `what` names the process in messages, `owner` is its id.

        Raises:
            InvalidRequest: it cannot be run, has ended before it was ready (quotes its last words), or does not
                become ready.
        """
        argv, environment = command(uri, owner, namespace)
        with ExitStack() as ours, ExitStack() as undo, ExitStack() as theirs:
            ends: dict[int, int] = {}  # by their numbers in the logger, which gets copies
            outputs = {}
            for number, name in ((_STDOUT, "stdout"), (_STDERR, "stderr")):
                ends[number], writer = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, ends[number])
                outputs[name] = Output(f"{name} of {what}", writer)
                undo.callback(outputs[name].release)
                os.set_blocking(writer, False)
                enlarge(writer)
            says_ready, ends[_READY] = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, ends[_READY])
            ours.callback(os.close, says_ready)
            running = AsyncExitStack()
            try:
                process = await running.enter_async_context(
                    spawned(argv, renumbered=ends, environment=environment, grace_s=_TERMINATE_LIMIT_S)
                )
            except ProgramNotFound as err:
                raise InvalidRequest(f"cannot run the logger {uri.path} of {what}: {err.why}") from err
            theirs.close()
            logger = cls(**outputs, process=process, running=running)
            try:
                await _until_ready(uri, what, process, says_ready)
            except BaseException:
                process.kill()
                await logger.aclose()
                raise
            undo.pop_all()
        return logger

    def release(self) -> None:
        """No more output comes. Harmless when repeated."""
        self.stdout.release()
        self.stderr.release()
        self._released.set()

    async def aclose(self) -> None:
        """No more output comes: wait for the logger's end, and see to it if need be."""
        self.release()
        await asyncio.wait([self._life])

    async def _live(self, process: Process, running: AsyncExitStack) -> None:
        async with running:
            try:
                await self._released.wait()
            finally:  # also when the shim itself ends: what is in the pipes is still written down
                self.release()
                await asyncio.wait([process.exited], timeout=_FINISH_LIMIT_S)


def command(uri: Uri, owner: str, namespace: str) -> tuple[list[str], dict[str, str]]:
    """The logger's arguments, its path first, and its environment."""
    parameters: dict[str, str] = {}
    for key, value in parse_qsl(uri.query, keep_blank_values=True):
        parameters.setdefault(key, value)
    argv, environment = [uri.path], {}
    for key, value in parameters.items():
        if key.startswith(_ENVIRONMENT_PREFIX):
            environment[key.removeprefix(_ENVIRONMENT_PREFIX)] = value
        else:
            argv += [key, value]
    return argv, {**environment, "CONTAINER_ID": owner, "CONTAINER_NAMESPACE": namespace}


async def _until_ready(uri: Uri, what: str, process: Process, says_ready: int) -> None:
    who = f"the logger {uri.path} of {what}"
    try:
        async with asyncio.timeout(_READY_LIMIT_S):
            await ready(says_ready, write=False)
    except TimeoutError as err:
        raise InvalidRequest(
            f"{who} is not ready after {_READY_LIMIT_S:g} s: it has to close descriptor {_READY}"
        ) from err
    if os.read(says_ready, 1):
        return
    if _is_ending(process):
        end = await process.wait()
        words = " | ".join(process.output_tail()) or "it said nothing"
        raise InvalidRequest(f"{who} ended before it was ready: {end}: {words}")
    if uri.scheme == "binary-v2":
        raise InvalidRequest(
            f"{who} closed descriptor {_READY} without a byte in it: with binary-v2:// that is a failure"
        )


def _is_ending(process: Process) -> bool:
    """Whether the kernel has begun to take the process down, of which closing its descriptors is a part."""
    if process.exited.done():
        return True
    return bool(int(stat_fields(process.pid)[9]) & _PF_EXITING)

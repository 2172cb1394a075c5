"""A container's stdout through the host's side of the shim: from the agent's socket into the FIFO that is read.

The agent is a program of its own that answers from memory (`stdout_agent`), the reader is `cat`; what is between them
are the shim's own parts, in this process. `cat` from a pipe into such a FIFO, in turn with it, is the ratio's base.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent_proto.client import AgentClient
from bench import ROOT
from bench.errors import BenchError
from bench.rows import Row
from shim.guest import GuestProcess
from shim.host_streams import enlarge
from shim.io import ProcessIO, Stdio
from ttrpc import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.lab import Lab

_RUNS_PER_TRANSFER = 2
_BYTES = 512 << 20
_MB, _GB = 1e6, 1e9
_AIM_MB_PER_S = 100.0
_LIMIT_S = 120.0


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """MB/s, and CPU seconds of what copies per GB; ours and `cat` in turn."""
    return rows(math.ceil(runs / _RUNS_PER_TRANSFER), step)


def rows(runs: int, step: Callable[[str], None]) -> list[Row]:
    """The same, which needs no lab."""
    ours, base = [], []
    for index in range(runs):
        step(f"{_BYTES >> 20} MiB of stdout, {index + 1} of {runs}")
        ours.append(asyncio.run(_through_the_shim()))
        base.append(_through_cat())
    name = "stdout through the shim, fake agent"
    return [
        Row(
            name=name,
            unit="MB/s",
            values=[_BYTES / _MB / seconds for seconds, _ in ours],
            to="cat",
            base=[_BYTES / _MB / seconds for seconds, _ in base],
            aim_least=_AIM_MB_PER_S,
        ),
        Row(
            name=f"  {name}: CPU time",
            unit="s/GB",
            values=[cpu_s / _BYTES * _GB for _, cpu_s in ours],
            to="cat",
            base=[cpu_s / _BYTES * _GB for _, cpu_s in base],
        ),
    ]


async def _through_the_shim() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process."""
    with _reader() as (folder, fifo, reader):
        argv = [sys.executable, "-m", "bench.stdout_agent", f"{folder}/agent", str(_BYTES)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT) as agent:
            try:
                assert agent.stdout is not None
                agent.stdout.readline()  # it listens
                async with await Client.connect_unix(f"{folder}/agent") as client, asyncio.timeout(_LIMIT_S):
                    process = GuestProcess(AgentClient(client), "bench")
                    io = ProcessIO(Stdio(stdout=fifo), "bench")
                    began, cpu_s = time.perf_counter(), time.process_time()
                    io.start(process)
                    await process.wait()
                    await io.aclose()
                    spent = time.perf_counter() - began, time.process_time() - cpu_s
            finally:
                agent.kill()
        _check(reader)
        return spent


def _through_cat() -> tuple[float, float]:
    """Seconds, and CPU seconds of the `cat` that copies."""
    with _reader() as (_, fifo, reader):
        kept, writer = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), os.open(fifo, os.O_WRONLY)
        enlarge(writer)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        with subprocess.Popen(["head", "-c", str(_BYTES), "/dev/zero"], stdout=subprocess.PIPE) as source:
            subprocess.run(["cat"], stdin=source.stdout, stdout=writer, check=True, timeout=_LIMIT_S)
            seconds = time.perf_counter() - began
            # `head` is still unreaped: what was counted meanwhile is `cat`.
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        os.close(writer)
        _check(reader)
        os.close(kept)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def _reader() -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """A folder, a FIFO in it, and a program that counts what it reads there."""
    with tempfile.TemporaryDirectory(prefix="kpb-") as folder:
        fifo = f"{folder}/stdout"
        os.mkfifo(fifo)
        with subprocess.Popen(f"exec wc -c < {fifo}", shell=True, stdout=subprocess.PIPE) as reader:
            try:
                yield folder, fifo, reader
            finally:
                reader.kill()


def _check(reader: subprocess.Popen[bytes]) -> None:
    counted, _ = reader.communicate(timeout=_LIMIT_S)
    if int(counted) != _BYTES:
        raise BenchError(f"{int(counted)} of {_BYTES} bytes reached the reader")

"""What a sandbox's programs cost, measured on programs whose cost is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from shim import sandbox_metrics
from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2
from shim.sandbox_metrics import Usage

MIB = 1 << 20
# Takes 40 MiB of memory and half a second of processor time, in a child of its own, and says so.
CHILD = f"memory = bytearray(b'x') * {40 * MIB}\nimport time\nwhile time.process_time() < 0.5: pass\n"
PROGRAM = f"""\
import subprocess, sys
child = subprocess.Popen([sys.executable, "-ISc", {CHILD + "print(flush=True); input()"!r}], stdin=0)
child.wait()
"""


def test_descendants_count() -> None:
    argv = [sys.executable, "-ISc", PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin and program.stdout
        program.stdout.readline()
        alone, together = sandbox_metrics.usage_of(program.pid), sandbox_metrics.overhead(program.pid)
        program.communicate(b"\n")
    assert together.anonymous - alone.anonymous > 40 * MIB
    assert together.memory < 200 * MIB
    assert 0.4e9 < together.user_ns + together.system_ns - (alone.user_ns + alone.system_ns) < 3e9
    assert (alone.threads, together.threads) == (1, 2)


def test_own_processor_time() -> None:
    usage = sandbox_metrics.usage_of(os.getpid())
    times = time.process_time()
    # The kernel counts in hundredths of a second there.
    assert times - 0.5 < (usage.user_ns + usage.system_ns) / 1e9 <= times + 0.02


def test_process_that_is_gone() -> None:
    with subprocess.Popen(["/bin/true"]) as program:
        program.wait()
    assert sandbox_metrics.overhead(program.pid) == Usage()


USAGE = Usage(user_ns=3_000_000, system_ns=2_000_999, anonymous=100, files=20, shared=3, threads=7)


def test_version_1() -> None:
    packed = sandbox_metrics.to_any(USAGE, unified=False)
    assert packed.type_url == "io.containerd.cgroups.v1.Metrics"
    metrics = cgroups_v1_pb2.Metrics.FromString(packed.value)
    cpu, memory = metrics.cpu.usage, metrics.memory
    assert (cpu.total, cpu.user, cpu.kernel) == (5_000_999, 3_000_000, 2_000_999)
    assert (memory.usage.usage, memory.rss, memory.cache, metrics.pids.current) == (123, 100, 23, 7)


def test_version_2() -> None:
    packed = sandbox_metrics.to_any(USAGE, unified=True)
    assert packed.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = cgroups_v2_pb2.Metrics.FromString(packed.value)
    cpu, memory = metrics.cpu, metrics.memory
    assert (cpu.usage_usec, cpu.user_usec, cpu.system_usec) == (5000, 3000, 2000)
    assert (memory.usage, memory.anon, memory.file, memory.shmem, metrics.pids.current) == (
        123,
        100,
        23,
        3,
        7,
    )

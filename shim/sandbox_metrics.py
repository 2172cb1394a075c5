"""What a sandbox costs its host beside its containers: the shim and everything it started, QEMU and virtiofsd.

Read from /proc (proc(5)), since these processes need not have a control group of their own. Memory is proportional
set size: the guest's memory is mapped by QEMU and virtiofsd, and must not count twice.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2
from shim.procfs import stat_fields
from shim.well_known import packed

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any

_KIB = 1024
_NS_PER_US = 1000


class Usage(NamedTuple):
    """Processor time in nanoseconds since the process's start, memory in bytes, threads."""

    user_ns: int = 0
    system_ns: int = 0
    anonymous: int = 0
    files: int = 0
    shared: int = 0
    threads: int = 0

    @property
    def memory(self) -> int:
        """All memory, bytes."""
        return self.anonymous + self.files + self.shared


def overhead(pid: int) -> Usage:
    """What a process and all its descendants use. Takes milliseconds per GiB of guest memory: not for an event loop."""
    usages = [usage_of(member) for member in _family(pid)]
    return Usage(*map(sum, zip(*usages, strict=True)))


def usage_of(pid: int) -> Usage:
    """What one process uses; nothing when it is gone."""
    try:
        fields = stat_fields(pid)
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            sizes = {
                line.split()[0]: int(line.split()[1]) * _KIB for line in file if line.startswith(b"Pss_")
            }
    except OSError:
        return Usage()
    ns_per_tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return Usage(
        user_ns=int(fields[14]) * ns_per_tick,
        system_ns=int(fields[15]) * ns_per_tick,
        anonymous=sizes.get(b"Pss_Anon:", 0),
        files=sizes.get(b"Pss_File:", 0),
        shared=sizes.get(b"Pss_Shmem:", 0),
        threads=int(fields[20]),
    )


def to_any(usage: Usage, *, unified: bool) -> Any:
    """The usage as the cgroup metrics that containerd's clients expect on a host of this mode, packed."""
    return packed(_to_v2(usage) if unified else _to_v1(usage))


def _to_v1(usage: Usage) -> cgroups_v1_pb2.Metrics:
    metrics = cgroups_v1_pb2.Metrics()
    metrics.cpu.usage.total = usage.user_ns + usage.system_ns
    metrics.cpu.usage.user = usage.user_ns
    metrics.cpu.usage.kernel = usage.system_ns
    metrics.memory.usage.usage = usage.memory
    metrics.memory.rss = metrics.memory.total_rss = usage.anonymous
    metrics.memory.cache = metrics.memory.total_cache = usage.files + usage.shared
    metrics.pids.current = usage.threads
    return metrics


def _to_v2(usage: Usage) -> cgroups_v2_pb2.Metrics:
    metrics = cgroups_v2_pb2.Metrics()
    metrics.cpu.usage_usec = (usage.user_ns + usage.system_ns) // _NS_PER_US
    metrics.cpu.user_usec = usage.user_ns // _NS_PER_US
    metrics.cpu.system_usec = usage.system_ns // _NS_PER_US
    metrics.memory.usage = usage.memory
    metrics.memory.anon = usage.anonymous
    # memory.stat counts shared memory as file memory as well.
    metrics.memory.file = usage.files + usage.shared
    metrics.memory.shmem = usage.shared
    metrics.pids.current = usage.threads
    return metrics


def _family(pid: int) -> list[int]:
    """The process and all its descendants, by thread: each thread has the children that it started."""
    found = [pid]
    for member in found:
        try:
            threads = os.listdir(f"/proc/{member}/task")
            for thread in threads:
                with open(f"/proc/{member}/task/{thread}/children", "rb") as file:
                    found += map(int, file.read().split())
        except OSError:
            continue  # it has ended meanwhile
    return found

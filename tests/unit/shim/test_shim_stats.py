"""What the agent counts, in the terms of both cgroup versions: whole messages, number by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf import text_format

from agent_proto.gen import agent_pb2
from shim import stats
from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.message import Message

REPLY = text_format.Parse(
    """
    cgroup_stats {
      cpu_stats {
        cpu_usage {
          total_usage: 3000500 percpu_usage: 1000 percpu_usage: 2000
          usage_in_kernelmode: 1000400 usage_in_usermode: 2000999
        }
        throttling_data { periods: 7 throttled_periods: 3 throttled_time: 4000600 }
      }
      memory_stats {
        cache: 11
        usage { usage: 21 max_usage: 22 failcnt: 23 limit: 24 }
        swap_usage { usage: 31 max_usage: 32 failcnt: 33 limit: 34 }
        kernel_usage { usage: 41 max_usage: 42 failcnt: 43 limit: 44 }
        stats { key: "events.low" value: 101 }
        stats { key: "events.high" value: 102 }
        stats { key: "events.max" value: 103 }
        stats { key: "events.oom" value: 104 }
        stats { key: "events.oom_kill" value: 105 }
        stats { key: "events.oom_group_kill" value: 106 }
        stats { key: "no_such_counter" value: 54 }
        stats { key: "swap" value: 59 }
        stats { key: "kernel" value: 60 }
      }
      pids_stats { current: 61 limit: 62 }
      blkio_stats {
        io_service_bytes_recursive { major: 8 minor: 1 op: "Read" value: 71 }
        io_service_bytes_recursive { major: 8 minor: 1 op: "Write" value: 72 }
        io_service_bytes_recursive { major: 8 minor: 2 op: "write" value: 73 }
        io_service_bytes_recursive { major: 8 minor: 1 op: "Total" value: 143 }
        io_serviced_recursive { major: 8 minor: 1 op: "Read" value: 74 }
        io_serviced_recursive { major: 8 minor: 2 op: "Write" value: 75 }
      }
      hugetlb_stats { key: "2MB" value { usage: 81 max_usage: 82 failcnt: 83 } }
    }
    network_stats {
      name: "eth0" rx_bytes: 91 rx_packets: 92 rx_errors: 93 rx_dropped: 94
      tx_bytes: 95 tx_packets: 96 tx_errors: 97 tx_dropped: 98
    }
    """,
    agent_pb2.StatsContainerResponse(),
)

V1 = text_format.Parse(
    """
    hugetlb { usage: 81 max: 82 failcnt: 83 pagesize: "2MB" }
    pids { current: 61 limit: 62 }
    cpu {
      usage { total: 3000500 kernel: 1000400 user: 2000999 per_cpu: 1000 per_cpu: 2000 }
      throttling { periods: 7 throttled_periods: 3 throttled_time: 4000600 }
    }
    memory {
      cache: 11
      usage { limit: 24 usage: 21 max: 22 failcnt: 23 }
      swap { limit: 34 usage: 31 max: 32 failcnt: 33 }
      kernel { limit: 44 usage: 41 max: 42 failcnt: 43 }
    }
    blkio {
      io_service_bytes_recursive { op: "Read" major: 8 minor: 1 value: 71 }
      io_service_bytes_recursive { op: "Write" major: 8 minor: 1 value: 72 }
      io_service_bytes_recursive { op: "write" major: 8 minor: 2 value: 73 }
      io_service_bytes_recursive { op: "Total" major: 8 minor: 1 value: 143 }
      io_serviced_recursive { op: "Read" major: 8 minor: 1 value: 74 }
      io_serviced_recursive { op: "Write" major: 8 minor: 2 value: 75 }
    }
    network {
      name: "eth0" rx_bytes: 91 rx_packets: 92 rx_errors: 93 rx_dropped: 94
      tx_bytes: 95 tx_packets: 96 tx_errors: 97 tx_dropped: 98
    }
    """,
    cgroups_v1_pb2.Metrics(),
)
V1.memory_oom_control.oom_kill = 105

V2 = text_format.Parse(
    """
    pids { current: 61 limit: 62 }
    cpu {
      usage_usec: 3000 user_usec: 2000 system_usec: 1000
      nr_periods: 7 nr_throttled: 3 throttled_usec: 4000
    }
    memory { usage: 21 usage_limit: 24 max_usage: 22 swap_usage: 10 swap_limit: 10 }
    memory_events { low: 101 high: 102 max: 103 oom: 104 oom_kill: 105 oom_group_kill: 106 }
    network {
      name: "eth0" rx_bytes: 91 rx_packets: 92 rx_errors: 93 rx_dropped: 94
      tx_bytes: 95 tx_packets: 96 tx_errors: 97 tx_dropped: 98
    }
    io {
      usage { major: 8 minor: 1 rbytes: 71 wbytes: 72 rios: 74 }
      usage { major: 8 minor: 2 wbytes: 73 wios: 75 }
    }
    hugetlb { current: 81 max: 82 failcnt: 83 pagesize: "2MB" }
    """,
    cgroups_v2_pb2.Metrics(),
)


# memory.stat as the kernel writes it; each counter has a value of its own.
OF_V1_GUEST = [
    "cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "pgpgin", "pgpgout", "pgfault", "pgmajfault",
    "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable",
]  # fmt: skip
V1_COUNTERS = {name: number for number, name in enumerate(OF_V1_GUEST, 1000)} | {
    f"total_{name}": number for number, name in enumerate(OF_V1_GUEST, 2000)
}
OF_V2_GUEST = [
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback",
    "anon_thp", "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable",
    "slab_unreclaimable", "pgfault", "pgmajfault", "workingset_refault_anon", "workingset_refault_file",
    "workingset_activate_anon", "workingset_activate_file", "workingset_nodereclaim", "pgrefill", "pgscan", "pgsteal",
    "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc",
]  # fmt: skip
MAX = 2**64 - 1
V2_COUNTERS = {name: number for number, name in enumerate(OF_V2_GUEST, 3000)}
RENAMED = {
    "rss": "anon", "cache": "file", "rss_huge": "anon_thp", "mapped_file": "file_mapped", "dirty": "file_dirty",
    "writeback": "file_writeback",
}  # fmt: skip
SAME = [
    "pgfault", "pgmajfault", "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable",
]  # fmt: skip
FIELDS_OF_V1 = {
    "pgpgin": "pg_pg_in",
    "pgpgout": "pg_pg_out",
    "pgfault": "pg_fault",
    "pgmajfault": "pg_maj_fault",
}


def field_of_v1(counter: str) -> str:
    total, bare = ("total_", counter[6:]) if counter.startswith("total_") else ("", counter)
    return total + FIELDS_OF_V1.get(bare, bare)


def counted(counters: dict[str, int]) -> agent_pb2.StatsContainerResponse:
    reply = agent_pb2.StatsContainerResponse()
    reply.cgroup_stats.memory_stats.stats.update(counters)
    return reply


def set_fields(message: Message) -> dict[str, int]:
    return {field.name: value for field, value in message.ListFields() if isinstance(value, int)}


def test_v1() -> None:
    assert text_format.MessageToString(stats.to_v1(REPLY)) == text_format.MessageToString(V1)


def test_v2() -> None:
    assert text_format.MessageToString(stats.to_v2(REPLY)) == text_format.MessageToString(V2)


def test_memory_of_a_v1_guest_on_a_v1_host() -> None:
    metrics = stats.to_v1(
        counted(V1_COUNTERS | {"hierarchical_memsw_limit": 58, "hierarchical_memory_limit": 57})
    )
    expected = {field_of_v1(name): value for name, value in V1_COUNTERS.items()}
    limits = {"hierarchical_swap_limit": 58, "hierarchical_memory_limit": 57}
    assert set_fields(metrics.memory) == expected | limits


def test_memory_of_a_v2_guest_on_a_v2_host() -> None:
    assert set_fields(stats.to_v2(counted(V2_COUNTERS)).memory) == V2_COUNTERS


def test_memory_of_a_v2_guest_on_a_v1_host() -> None:
    alone = {field_of_v1(v1): V2_COUNTERS[v2] for v1, v2 in (RENAMED | {name: name for name in SAME}).items()}
    memory = set_fields(stats.to_v1(counted(V2_COUNTERS)).memory)
    assert memory == alone | {f"total_{name}": value for name, value in alone.items()}
    assert memory["total_inactive_file"] == V2_COUNTERS["inactive_file"]  # the working set is without it


def test_memory_of_a_v1_guest_on_a_v2_host() -> None:
    memory = set_fields(stats.to_v2(counted(V1_COUNTERS)).memory)
    names = RENAMED | {name: name for name in SAME}
    assert memory == {v2: V1_COUNTERS[f"total_{v1}"] for v1, v2 in names.items()}


@pytest.mark.parametrize(
    ("usage", "with_swap", "expected"),
    [(100, 130, 30), (100, 100, 0), (100, 7, 7), (100, 0, 0), (100, MAX, MAX), (MAX, MAX, MAX)],
)
def test_swap_alone(usage: int, with_swap: int, expected: int) -> None:
    reply = agent_pb2.StatsContainerResponse()
    memory = reply.cgroup_stats.memory_stats
    memory.usage.usage, memory.swap_usage.usage = usage, with_swap
    memory.usage.limit, memory.swap_usage.limit = usage, with_swap
    metrics = stats.to_v2(reply).memory
    assert (metrics.swap_usage, metrics.swap_limit) == (expected, expected)


def test_no_limit_of_processes() -> None:
    empty = agent_pb2.StatsContainerResponse()
    assert (stats.to_v1(empty).pids.limit, stats.to_v2(empty).pids.limit) == (0, 2**64 - 1)


@pytest.mark.parametrize(
    ("files", "unified"),
    [
        (["cgroup.controllers", "memory.stat"], True),
        (["memory/memory.stat", "unified/cgroup.controllers"], False),
        (["memory/memory.stat"], False),
    ],
    ids=["unified", "hybrid", "v1"],
)
def test_mode_of_the_host(tmp_path: Path, files: list[str], unified: bool) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert stats.host_is_unified(str(tmp_path)) is unified


def test_packed() -> None:
    v1, v2 = stats.to_any(REPLY, unified=False), stats.to_any(REPLY, unified=True)
    assert (v1.type_url, v2.type_url) == (
        "io.containerd.cgroups.v1.Metrics",
        "io.containerd.cgroups.v2.Metrics",
    )
    assert cgroups_v1_pb2.Metrics.FromString(v1.value) == V1
    assert cgroups_v2_pb2.Metrics.FromString(v2.value) == V2


def test_nothing_counted_is_no_error() -> None:
    empty = agent_pb2.StatsContainerResponse()
    assert stats.to_v1(empty).memory.usage.usage == stats.to_v2(empty).memory.usage == 0

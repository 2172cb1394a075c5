"""What the agent counts, in the terms of both cgroup versions: whole messages, number by number."""

from __future__ import annotations

from google.protobuf import text_format

from agent_proto.gen import agent_pb2
from shim import stats
from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2

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
        stats { key: "pgfault" value: 51 }
        stats { key: "rss" value: 52 }
        stats { key: "pgpgin" value: 55 }
        stats { key: "total_pgpgout" value: 56 }
        stats { key: "total_pgmajfault" value: 57 }
        stats { key: "hierarchical_memsw_limit" value: 58 }
        stats { key: "anon" value: 53 }
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
      cache: 11 rss: 52 pg_fault: 51 pg_pg_in: 55 total_pg_pg_out: 56 total_pg_maj_fault: 57
      hierarchical_swap_limit: 58
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

V2 = text_format.Parse(
    """
    pids { current: 61 limit: 62 }
    cpu {
      usage_usec: 3000 user_usec: 2000 system_usec: 1000
      nr_periods: 7 nr_throttled: 3 throttled_usec: 4000
    }
    memory {
      anon: 53 pgfault: 51 usage: 21 usage_limit: 24 max_usage: 22 swap_usage: 31 swap_limit: 34
    }
    io {
      usage { major: 8 minor: 1 rbytes: 71 wbytes: 72 rios: 74 }
      usage { major: 8 minor: 2 wbytes: 73 wios: 75 }
    }
    hugetlb { current: 81 max: 82 pagesize: "2MB" }
    """,
    cgroups_v2_pb2.Metrics(),
)


def test_v1() -> None:
    assert text_format.MessageToString(stats.to_v1(REPLY)) == text_format.MessageToString(V1)


def test_v2() -> None:
    assert text_format.MessageToString(stats.to_v2(REPLY)) == text_format.MessageToString(V2)


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

"""Statistics: from what the agent counts to the cgroup metrics that containerd's users read.

The agent speaks in the terms of cgroup v1. containerd's clients expect the message of the host's own mode:
`io.containerd.cgroups.v1.Metrics` on a v1 or hybrid host, `io.containerd.cgroups.v2.Metrics` on a unified one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any

from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from agent_proto.gen import agent_pb2

_NS_PER_US = 1000
# Fields that are not called what memory.stat calls them, beside the page counters: the kernel writes those "pgfault".
_KERNEL_NAMES = {"hierarchical_swap_limit": "hierarchical_memsw_limit"}


def host_is_unified() -> bool:
    """Whether the host has cgroup v2 only: its root then has the list of controllers."""
    return os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def to_any(reply: agent_pb2.StatsContainerResponse, *, unified: bool) -> Any:
    """The reply as the message that containerd expects, packed."""
    message: Message = to_v2(reply) if unified else to_v1(reply)
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def to_v1(reply: agent_pb2.StatsContainerResponse) -> cgroups_v1_pb2.Metrics:
    """cgroup v1: times in nanoseconds, sizes in bytes."""
    source = reply.cgroup_stats
    metrics = cgroups_v1_pb2.Metrics()
    cpu = source.cpu_stats
    metrics.cpu.usage.total = cpu.cpu_usage.total_usage
    metrics.cpu.usage.kernel = cpu.cpu_usage.usage_in_kernelmode
    metrics.cpu.usage.user = cpu.cpu_usage.usage_in_usermode
    metrics.cpu.usage.per_cpu.extend(cpu.cpu_usage.percpu_usage)
    metrics.cpu.throttling.periods = cpu.throttling_data.periods
    metrics.cpu.throttling.throttled_periods = cpu.throttling_data.throttled_periods
    metrics.cpu.throttling.throttled_time = cpu.throttling_data.throttled_time
    memory = source.memory_stats
    metrics.memory.cache = memory.cache
    for name, entry in (
        ("usage", memory.usage),
        ("swap", memory.swap_usage),
        ("kernel", memory.kernel_usage),
    ):
        target = getattr(metrics.memory, name)
        target.usage, target.max = entry.usage, entry.max_usage
        target.failcnt, target.limit = entry.failcnt, entry.limit
    _copy_known(dict(memory.stats), metrics.memory)
    metrics.pids.current = source.pids_stats.current
    metrics.pids.limit = source.pids_stats.limit
    for field in source.blkio_stats.DESCRIPTOR.fields:
        for entry in getattr(source.blkio_stats, field.name):
            getattr(metrics.blkio, field.name).add(
                op=entry.op, major=entry.major, minor=entry.minor, value=entry.value
            )
    for size, huge in source.hugetlb_stats.items():
        metrics.hugetlb.add(pagesize=size, usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    for net in reply.network_stats:
        metrics.network.add(
            name=net.name,
            rx_bytes=net.rx_bytes, rx_packets=net.rx_packets, rx_errors=net.rx_errors, rx_dropped=net.rx_dropped,
            tx_bytes=net.tx_bytes, tx_packets=net.tx_packets, tx_errors=net.tx_errors, tx_dropped=net.tx_dropped,
        )  # fmt: skip
    return metrics


def to_v2(reply: agent_pb2.StatsContainerResponse) -> cgroups_v2_pb2.Metrics:
    """cgroup v2: times in microseconds, sizes in bytes."""
    source = reply.cgroup_stats
    metrics = cgroups_v2_pb2.Metrics()
    cpu = source.cpu_stats
    metrics.cpu.usage_usec = cpu.cpu_usage.total_usage // _NS_PER_US
    metrics.cpu.user_usec = cpu.cpu_usage.usage_in_usermode // _NS_PER_US
    metrics.cpu.system_usec = cpu.cpu_usage.usage_in_kernelmode // _NS_PER_US
    metrics.cpu.nr_periods = cpu.throttling_data.periods
    metrics.cpu.nr_throttled = cpu.throttling_data.throttled_periods
    metrics.cpu.throttled_usec = cpu.throttling_data.throttled_time // _NS_PER_US
    memory = source.memory_stats
    metrics.memory.usage = memory.usage.usage
    metrics.memory.usage_limit = memory.usage.limit
    metrics.memory.max_usage = memory.usage.max_usage
    metrics.memory.swap_usage = memory.swap_usage.usage
    metrics.memory.swap_limit = memory.swap_usage.limit
    _copy_known(dict(memory.stats), metrics.memory)
    metrics.pids.current = source.pids_stats.current
    metrics.pids.limit = source.pids_stats.limit
    _add_io(source, metrics)
    for size, huge in source.hugetlb_stats.items():
        metrics.hugetlb.add(pagesize=size, current=huge.usage, max=huge.max_usage)
    return metrics


def _add_io(source: agent_pb2.CgroupStats, metrics: cgroups_v2_pb2.Metrics) -> None:
    devices: dict[tuple[int, int], cgroups_v2_pb2.IOEntry] = {}
    kinds = (
        (source.blkio_stats.io_service_bytes_recursive, {"read": "rbytes", "write": "wbytes"}),
        (source.blkio_stats.io_serviced_recursive, {"read": "rios", "write": "wios"}),
    )
    for entries, fields in kinds:
        for entry in entries:
            field = fields.get(entry.op.lower())
            if field is None:
                continue
            key = (entry.major, entry.minor)
            if key not in devices:
                devices[key] = metrics.io.usage.add(major=entry.major, minor=entry.minor)
            setattr(devices[key], field, entry.value)


def _copy_known(values: dict[str, int], target: Message) -> None:
    """Copy counters of memory.stat into the fields for them; the kernel has more than the message."""
    for name, field in target.DESCRIPTOR.fields_by_name.items():
        counter = _KERNEL_NAMES.get(name) or name.replace("pg_", "pg").replace("pgmaj_", "pgmaj")
        # Some messages inside, such as `swap`, share their name with a counter.
        if field.message_type is None and counter in values:
            setattr(target, name, values[counter])

"""Statistics: from what the agent counts to the cgroup metrics that containerd's users read.

containerd's clients expect the message of the host's own mode: `io.containerd.cgroups.v1.Metrics` on a v1 or hybrid
host, `io.containerd.cgroups.v2.Metrics` on a unified one. The agent's message has the shape of cgroup v1, with the
counters of memory.stat in it as its guest's kernel calls them, which depends on the guest's mode: the host's and the
guest's are any two. Working sets, which is what Kubernetes evicts pods by, are computed by containerd from what is
called `total_inactive_file` in v1 and `inactive_file` in v2.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2
from shim.well_known import packed

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import Message

    from agent_proto.gen import agent_pb2

_NS_PER_US = 1000
# How both protocols write "max".
_NO_LIMIT = 2**64 - 1
# Fields that are not called what memory.stat calls them, beside the page counters: the kernel writes those "pgfault".
_KERNEL_NAMES = {"hierarchical_swap_limit": "hierarchical_memsw_limit"}
# The same counters of memory.stat in the terms of v1 and v2 (Linux, admin-guide/cgroup-v1/memory and cgroup-v2). Those
# of v1 are there twice: for the group alone, and as "total_..." with the groups below it, which is v2's only kind.
_V2_TERMS = {
    "rss": "anon", "cache": "file", "rss_huge": "anon_thp", "mapped_file": "file_mapped", "dirty": "file_dirty",
    "writeback": "file_writeback", "pgfault": "pgfault", "pgmajfault": "pgmajfault", "inactive_anon": "inactive_anon",
    "active_anon": "active_anon", "inactive_file": "inactive_file", "active_file": "active_file",
    "unevictable": "unevictable",
}  # fmt: skip
# What our agent calls the lines of memory.events among those of memory.stat.
_EVENTS = "events."


def host_is_unified(cgroups: str = "/sys/fs/cgroup") -> bool:
    """Whether the host has cgroup v2 only: its root then has the list of controllers. A hybrid host's has folders, and
    the list in one of them."""
    return os.path.exists(f"{cgroups}/cgroup.controllers")


def to_any(reply: agent_pb2.StatsContainerResponse, *, unified: bool) -> Any:
    """The reply as the message that containerd expects, packed."""
    return packed(to_v2(reply) if unified else to_v1(reply))


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
    values = _v1_values(dict(memory.stats))
    _copy_known(values, metrics.memory)
    metrics.memory_oom_control.oom_kill = values.get(f"{_EVENTS}oom_kill", 0)
    metrics.pids.current = source.pids_stats.current
    metrics.pids.limit = source.pids_stats.limit
    for field in source.blkio_stats.DESCRIPTOR.fields:
        for entry in getattr(source.blkio_stats, field.name):
            getattr(metrics.blkio, field.name).add(
                op=entry.op, major=entry.major, minor=entry.minor, value=entry.value
            )
    for size, huge in source.hugetlb_stats.items():
        metrics.hugetlb.add(pagesize=size, usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    _add_network(reply, metrics)
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
    metrics.memory.swap_usage = _swap_alone(memory.swap_usage.usage, memory.usage.usage)
    metrics.memory.swap_limit = _swap_alone(memory.swap_usage.limit, memory.usage.limit)
    values = _v2_values(dict(memory.stats))
    _copy_known(values, metrics.memory)
    events = {name.removeprefix(_EVENTS): value for name, value in values.items() if name.startswith(_EVENTS)}
    _copy_known(events, metrics.memory_events)
    metrics.pids.current = source.pids_stats.current
    metrics.pids.limit = source.pids_stats.limit or _NO_LIMIT  # v1 has 0 for "max"
    _add_io(source, metrics)
    for size, huge in source.hugetlb_stats.items():
        metrics.hugetlb.add(pagesize=size, current=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    _add_network(reply, metrics)
    return metrics


def _add_network(
    reply: agent_pb2.StatsContainerResponse, metrics: cgroups_v1_pb2.Metrics | cgroups_v2_pb2.Metrics
) -> None:
    for net in reply.network_stats:
        metrics.network.add(
            name=net.name,
            rx_bytes=net.rx_bytes, rx_packets=net.rx_packets, rx_errors=net.rx_errors, rx_dropped=net.rx_dropped,
            tx_bytes=net.tx_bytes, tx_packets=net.tx_packets, tx_errors=net.tx_errors, tx_dropped=net.tx_dropped,
        )  # fmt: skip


def _swap_alone(with_memory: int, memory: int) -> int:
    """v1 counts memory and swap together. Kata's agent passes swap alone, which is less than the memory then."""
    return with_memory - memory if memory <= with_memory < _NO_LIMIT else with_memory


def _v1_values(values: dict[str, int]) -> dict[str, int]:
    """The counters in v1's terms, whatever the guest's mode is."""
    if "anon" not in values:
        return values
    renamed = {v1: values[v2] for v1, v2 in _V2_TERMS.items() if v2 in values}
    return values | renamed | {f"total_{name}": value for name, value in renamed.items()}


def _v2_values(values: dict[str, int]) -> dict[str, int]:
    """The counters in v2's terms, whatever the guest's mode is."""
    return values | {v2: values[f"total_{v1}"] for v1, v2 in _V2_TERMS.items() if f"total_{v1}" in values}


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

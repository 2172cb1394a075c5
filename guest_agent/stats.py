"""Numbers about containers and the guest: cgroup files and /proc into the agent protocol's messages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent_proto.gen import agent_pb2, csi_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_agent.cgroup import Cgroup

#: What "max" becomes where the protocol has only numbers.
NO_LIMIT = 2**64 - 1
_NET_COLUMNS = {
    "rx_bytes": 0, "rx_packets": 1, "rx_errors": 2, "rx_dropped": 3,
    "tx_bytes": 8, "tx_packets": 9, "tx_errors": 10, "tx_dropped": 11,
}  # fmt: skip
#: io.stat's keys in the vocabulary of the older cgroup files that the protocol mirrors.
_IO_BYTES = {"rbytes": "Read", "wbytes": "Write", "dbytes": "Discard"}
_IO_COUNTS = {"rios": "Read", "wios": "Write", "dios": "Discard"}


def container_stats(cgroup: Cgroup) -> agent_pb2.StatsContainerResponse:
    """Everything the protocol asks for about one container, and the pod's network, which is the guest's."""
    response = agent_pb2.StatsContainerResponse()
    stats = response.cgroup_stats
    _cpu(cgroup, stats.cpu_stats)
    _memory(cgroup, stats.memory_stats)
    stats.pids_stats.current = _number(cgroup.read("pids.current"))
    stats.pids_stats.limit = _number(cgroup.read("pids.max"), unlimited=0)
    _io(cgroup, stats.blkio_stats)
    _hugetlb(cgroup, stats)
    response.network_stats.extend(interface for interface in network_stats() if interface.name != "lo")
    return response


def _cpu(cgroup: Cgroup, into: agent_pb2.CpuStats) -> None:
    values = _pairs(cgroup.read("cpu.stat"))
    into.cpu_usage.total_usage = values.get("usage_usec", 0) * 1000
    into.cpu_usage.usage_in_usermode = values.get("user_usec", 0) * 1000
    into.cpu_usage.usage_in_kernelmode = values.get("system_usec", 0) * 1000
    into.throttling_data.periods = values.get("nr_periods", 0)
    into.throttling_data.throttled_periods = values.get("nr_throttled", 0)
    into.throttling_data.throttled_time = values.get("throttled_usec", 0) * 1000


def _memory(cgroup: Cgroup, into: agent_pb2.MemoryStats) -> None:
    values = _pairs(cgroup.read("memory.stat"))
    events = _pairs(cgroup.read("memory.events"))
    into.cache = values.get("file", 0)
    into.use_hierarchy = True
    into.usage.usage = _number(cgroup.read("memory.current"))
    into.usage.max_usage = _number(cgroup.read("memory.peak"))
    into.usage.limit = _number(cgroup.read("memory.max"))
    into.usage.failcnt = events.get("max", 0)
    # The older interface counts memory and swap together.
    into.swap_usage.usage = into.usage.usage + _number(cgroup.read("memory.swap.current"))
    into.swap_usage.limit = min(NO_LIMIT, into.usage.limit + _number(cgroup.read("memory.swap.max")))
    into.kernel_usage.usage = values.get("kernel", 0)
    into.kernel_usage.limit = NO_LIMIT
    into.stats.update(values)
    into.stats["hierarchical_memory_limit"] = into.usage.limit  # a counter of the older files only
    # The protocol has no fields for them.
    into.stats.update({f"events.{name}": value for name, value in events.items()})


def _io(cgroup: Cgroup, into: agent_pb2.BlkioStats) -> None:
    for line in cgroup.read("io.stat").splitlines():
        major = minor = 0
        for word in line.split():
            key, equals, value = word.partition("=")
            if not equals:  # some kernels put a device without numbers in front, in the same line
                major, minor = map(int, word.split(":"))
            elif key in _IO_BYTES:
                into.io_service_bytes_recursive.add(
                    major=major, minor=minor, op=_IO_BYTES[key], value=int(value)
                )
            elif key in _IO_COUNTS:
                into.io_serviced_recursive.add(major=major, minor=minor, op=_IO_COUNTS[key], value=int(value))


def _hugetlb(cgroup: Cgroup, into: agent_pb2.CgroupStats) -> None:
    try:
        names = os.listdir(cgroup.path)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith("hugetlb.") and name.endswith(".current") and ".rsvd." not in name:
            size = name.split(".")[1]
            into.hugetlb_stats[size].usage = _number(cgroup.read(name))
            into.hugetlb_stats[size].failcnt = _pairs(cgroup.read(f"hugetlb.{size}.events")).get("max", 0)


def network_stats(path: str = "/proc/net/dev") -> Iterator[agent_pb2.NetworkStats]:
    """One message per interface, loopback included."""
    with open(path) as file:
        lines = file.read().splitlines()[2:]
    for line in lines:
        name, _, rest = line.partition(":")
        columns = rest.split()
        numbers = {field: int(columns[index]) for field, index in _NET_COLUMNS.items()}
        yield agent_pb2.NetworkStats(name=name.strip(), **numbers)


def volume_stats(path: str) -> csi_pb2.VolumeStatsResponse:
    """Space and inodes of the file system at a path. Raises OSError."""
    info = os.statvfs(path)
    response = csi_pb2.VolumeStatsResponse()
    bytes_unit, inodes_unit = csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES
    response.usage.add(
        available=info.f_bavail * info.f_frsize,
        total=info.f_blocks * info.f_frsize,
        used=(info.f_blocks - info.f_bfree) * info.f_frsize,
        unit=bytes_unit,
    )
    response.usage.add(
        available=info.f_favail, total=info.f_files, used=info.f_files - info.f_ffree, unit=inodes_unit
    )
    return response


def metrics(containers_running: int) -> str:
    """The guest's condition in the text format of Prometheus."""
    lines = ["# TYPE kata_guest_load gauge"]
    for name, value in zip(("load1", "load5", "load15"), os.getloadavg(), strict=True):
        lines.append(f'kata_guest_load{{item="{name}"}} {value}')
    lines.append("# TYPE kata_guest_meminfo gauge")
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            number, *unit = rest.split()
            scale = 1024 if unit else 1
            lines.append(f'kata_guest_meminfo{{item="{name}"}} {int(number) * scale}')
    lines.append("# TYPE kata_guest_netdev_stat gauge")
    for interface in network_stats():
        for field in _NET_COLUMNS:
            labels = f'interface="{interface.name}",item="{field}"'
            lines.append(f"kata_guest_netdev_stat{{{labels}}} {getattr(interface, field)}")
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    lines += ["# TYPE kata_agent_total_rss gauge", f"kata_agent_total_rss {resident}"]
    lines += [
        "# TYPE kata_agent_containers_running gauge",
        f"kata_agent_containers_running {containers_running}",
    ]
    return "\n".join(lines) + "\n"


def _pairs(text: str) -> dict[str, int]:
    values = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            values[name] = int(value)
    return values


def _number(text: str, unlimited: int = NO_LIMIT) -> int:
    text = text.strip()
    if text == "max":
        return unlimited
    return int(text) if text else 0

"""Statistics of a group of version 2, in the form that those of version 1 have."""

from __future__ import annotations

from oci_engine.cgroups.files import number, pairs, read
from oci_engine.cgroups.v1_stats import hugetlb

_NS_PER_US = 1000
_IO_FILES = {
    "rbytes": ("bytes", "read"),
    "wbytes": ("bytes", "write"),
    "rios": ("ios", "read"),
    "wios": ("ios", "write"),
}


def read_all(path: str) -> dict[str, object]:
    cpu, raw, events = (pairs(f"{path}/{name}") for name in ("cpu.stat", "memory.stat", "memory.events"))
    current, limit = number(f"{path}/memory.current"), number(f"{path}/memory.max")
    swap, swap_limit = number(f"{path}/memory.swap.current"), number(f"{path}/memory.swap.max")
    sizes, operations = _io(read(f"{path}/io.stat"))
    pids = read(f"{path}/pids.max")
    return {
        "cpu": {
            "usage": {
                "total": cpu.get("usage_usec", 0) * _NS_PER_US,
                "kernel": cpu.get("system_usec", 0) * _NS_PER_US,
                "user": cpu.get("user_usec", 0) * _NS_PER_US,
            },
            "throttling": {
                "periods": cpu.get("nr_periods", 0),
                "throttledPeriods": cpu.get("nr_throttled", 0),
                "throttledTime": cpu.get("throttled_usec", 0) * _NS_PER_US,
            },
        },
        "memory": {
            "cache": raw.get("file", 0),
            "usage": {
                "limit": limit,
                "usage": current,
                "max": number(f"{path}/memory.peak"),
                "failcnt": events.get("max", 0),
            },
            # Memory and swap together, as in version 1.
            "swap": {"limit": min(limit + swap_limit, (1 << 64) - 1), "usage": current + swap, "failcnt": 0},
            "raw": raw,
        },
        "pids": {
            "current": number(f"{path}/pids.current"),
            "limit": int(pids) if pids.isdigit() else 0,
        },
        "blkio": {"ioServiceBytesRecursive": sizes, "ioServicedRecursive": operations},
        "hugetlb": hugetlb(path, usage="current", highest="max"),
    }


def _io(text: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Lines `major:minor rbytes=1 wbytes=2 ...`."""
    found: dict[str, list[dict[str, object]]] = {"bytes": [], "ios": []}
    for line in text.splitlines():
        device, *fields = line.split()
        if ":" not in device:
            continue
        major, minor = map(int, device.split(":"))
        for field in fields:
            name, _, value = field.partition("=")
            if name in _IO_FILES:
                kind, operation = _IO_FILES[name]
                found[kind].append({"major": major, "minor": minor, "op": operation, "value": int(value)})
    return found["bytes"], found["ios"]

"""Statistics of a group of version 1."""

from __future__ import annotations

import os

from oci_engine.cgroups.files import number, pairs, read

_NS_PER_TICK = 10_000_000  # of USER_HZ, which is 100 on every architecture that is met here


def read_block(path: str, file: str) -> list[dict[str, object]]:
    """Lines `major:minor operation value`."""
    found: list[dict[str, object]] = []
    for line in read(f"{path}/{file}").splitlines():
        fields = line.split()
        if len(fields) == 3 and ":" in fields[0]:
            major, minor = map(int, fields[0].split(":"))
            found.append({"major": major, "minor": minor, "op": fields[1].lower(), "value": int(fields[2])})
    return found


def hugetlb(path: str, *, usage: str, highest: str, failures: str = "") -> dict[str, object]:
    """By page size. File names differ between the versions; the second one does not count failures as one number."""
    found: dict[str, object] = {}
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        parts = name.split(".")
        if len(parts) >= 3 and parts[0] == "hugetlb" and ".".join(parts[2:]) == usage:
            base = f"{path}/hugetlb.{parts[1]}"
            found[parts[1]] = {
                "usage": number(f"{base}.{usage}"),
                "max": number(f"{base}.{highest}"),
                "failcnt": number(f"{base}.{failures}") if failures else 0,
            }
    return found


def _memory(path: str, kind: str) -> dict[str, int]:
    base = f"{path}/memory.{kind}"
    return {
        "limit": number(f"{base}limit_in_bytes"),
        "usage": number(f"{base}usage_in_bytes"),
        "max": number(f"{base}max_usage_in_bytes"),
        "failcnt": number(f"{base}failcnt"),
    }


def read_all(paths: dict[str, str]) -> dict[str, object]:
    """As runc's events have it."""
    cpu, account, memory = (paths.get(name, "") for name in ("cpu", "cpuacct", "memory"))
    throttled = pairs(f"{cpu}/cpu.stat")
    usage = pairs(f"{account}/cpuacct.stat")
    raw = pairs(f"{memory}/memory.stat")
    per_cpu = [int(value) for value in read(f"{account}/cpuacct.usage_percpu").split()]
    return {
        "cpu": {
            "usage": {
                "total": number(f"{account}/cpuacct.usage"),
                "percpu": per_cpu,
                "kernel": usage.get("system", 0) * _NS_PER_TICK,
                "user": usage.get("user", 0) * _NS_PER_TICK,
            },
            "throttling": {
                "periods": throttled.get("nr_periods", 0),
                "throttledPeriods": throttled.get("nr_throttled", 0),
                "throttledTime": throttled.get("throttled_time", 0),
            },
        },
        "memory": {
            "cache": raw.get("cache", 0),
            "usage": _memory(memory, ""),
            "swap": _memory(memory, "memsw."),
            "kernel": _memory(memory, "kmem."),
            "kernelTCP": _memory(memory, "kmem.tcp."),
            "raw": raw,
        },
        "pids": {
            "current": number(f"{paths.get('pids', '')}/pids.current"),
            "limit": _limit(f"{paths.get('pids', '')}/pids.max"),
        },
        "blkio": {
            "ioServiceBytesRecursive": read_block(
                paths.get("blkio", ""), "blkio.throttle.io_service_bytes_recursive"
            ),
            "ioServicedRecursive": read_block(paths.get("blkio", ""), "blkio.throttle.io_serviced_recursive"),
        },
        "hugetlb": hugetlb(
            paths.get("hugetlb", ""), usage="usage_in_bytes", highest="max_usage_in_bytes", failures="failcnt"
        ),
    }


def _limit(path: str) -> int:
    """0 is none, as in runc's events."""
    return 0 if read(path) == "max" else number(path)

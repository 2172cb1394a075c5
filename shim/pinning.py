"""The threads that are a machine's processors, each kept on one of the host's: `enable_vcpus_pinning`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

log = structlog.get_logger()

# As many as Linux can be built for on any machine.
_CPUS_LIMIT = 8192


def cpus_of(text: str, what: str) -> frozenset[int]:
    """The CPUs in a list like "0-3,8" (cpuset(7), "List format").

    Raises:
        InvalidRequest: it is none; the message begins with `what`.
    """
    found: set[int] = set()
    for part in filter(None, (word.strip() for word in text.split(","))):
        first, dash, last = part.partition("-")
        # int() takes more than cpuset(7) does: signs, spaces, digits of other scripts.
        numbers = [
            int(word) for word in (first, last) if word.isascii() and word.isdecimal() and len(word) < 6
        ]
        if len(numbers) != 1 + bool(dash) or numbers[0] > numbers[-1] or numbers[-1] >= _CPUS_LIMIT:
            raise InvalidRequest(f"{what}: {text[:80]!r} is no list of CPUs such as 0-3,8")
        found.update(range(numbers[0], numbers[-1] + 1))
    return frozenset(found)


class Pinning:
    """Of one machine. Its threads may run wherever QEMU may, until there is one CPU for each."""

    def __init__(self, qemu_pid: int) -> None:
        self._qemu_pid = qemu_pid
        self._pinned: dict[int, int] = {}

    def apply(self, threads: Sequence[int], cpus: Collection[int], used: int | None = None) -> None:
        """Keep each thread on a CPU of its own when there are as many of both; else let all of them go. The guest uses
        only the first ones when `used` says how many."""
        busy = threads[:used]
        wanted = dict(zip(busy, sorted(cpus), strict=False)) if len(busy) == len(cpus) else {}
        if wanted == self._pinned:
            return
        try:
            for thread in threads:
                self._place(thread, wanted.get(thread))
        except OSError as err:
            log.warning(
                "vcpus_not_pinned",
                cpus=sorted(cpus),
                error=f"{err.strerror}; the CPUs have to be online, and among those that the shim may use",
            )
            wanted = {}
            for thread in threads:
                self._let_go(thread)
        self._pinned = wanted
        log.info("vcpus_pinned", threads=wanted)

    def _place(self, thread: int, cpu: int | None) -> None:
        if cpu is None:
            self._let_go(thread)
        else:
            os.sched_setaffinity(thread, {cpu})

    def _let_go(self, thread: int) -> None:
        # QEMU's first thread is never pinned, and so has what the host gave the machine.
        os.sched_setaffinity(thread, os.sched_getaffinity(self._qemu_pid))

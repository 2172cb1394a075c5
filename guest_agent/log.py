"""The agent's log: events with named values, to the console and, as JSON lines, to whoever reads the log port.

An event is a past-tense name; values are keywords. Lines that were written before somebody connected are kept,
the oldest are given up first, and their number is told.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING

from guest_agent.jsontext import dumps

if TYPE_CHECKING:
    from collections.abc import Callable

#: Kata's names of the levels, which its host side reads from the stream.
WIRE_LEVELS = {
    "trace": "TRCE",
    "debug": "DEBG",
    "info": "INFO",
    "warning": "WARN",
    "error": "ERRO",
    "critical": "CRIT",
}
_ORDER = {name: index for index, name in enumerate(WIRE_LEVELS)}
#: Bytes kept for a reader that has not come yet, or is slow.
BACKLOG_BYTES = 256 * 1024


class Backlog:
    """Lines for a reader, bounded in bytes. `wake` is called whenever there is something new."""

    def __init__(self, limit_bytes: int = BACKLOG_BYTES) -> None:
        self._lines: deque[bytes] = deque()
        self._limit = limit_bytes
        self._size = 0
        self.lost = 0
        self.wake: Callable[[], None] | None = None

    def put(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        while self._size > self._limit and len(self._lines) > 1:
            self._size -= len(self._lines.popleft())
            self.lost += 1
        if self.wake is not None:
            self.wake()

    def take(self, limit_bytes: int) -> bytes:
        """Whole lines up to about `limit_bytes`, empty when there are none."""
        parts, size = [], 0
        while self._lines and size < limit_bytes:
            line = self._lines.popleft()
            self._size -= len(line)
            size += len(line)
            parts.append(line)
        return b"".join(parts)


class Log:
    """Where events go. Console lines are only for what somebody must see without a host: warnings and above.

    The console is a serial line of a few kilobytes a second that stops the whole agent while it writes.
    """

    def __init__(
        self, level: str = "info", *, console_fd: int | None = 1, console_level: str = "warning"
    ) -> None:
        self.backlog = Backlog()
        self._level = _ORDER[level]
        self._console_fd = console_fd
        self._console_level = _ORDER[console_level]

    def debug(self, event: str, **values: object) -> None:
        self._write("debug", event, values)

    def info(self, event: str, **values: object) -> None:
        self._write("info", event, values)

    def warning(self, event: str, **values: object) -> None:
        self._write("warning", event, values)

    def error(self, event: str, **values: object) -> None:
        self._write("error", event, values)

    def critical(self, event: str, **values: object) -> None:
        self._write("critical", event, values)

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        order = _ORDER[level]
        if order >= self._level:
            line = {
                "msg": event,
                "level": WIRE_LEVELS[level],
                "ts": _now(),
                "name": "kata-py-agent",
                **values,
            }
            self.backlog.put(dumps(line).encode() + b"\n")
        if self._console_fd is not None and order >= self._console_level:
            words = " ".join(f"{name}={value}" for name, value in values.items())
            os.write(self._console_fd, f"agent: {level}: {event} {words}\n".encode())


def _now() -> str:
    seconds, fraction = divmod(time.time_ns() // 1000, 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:06d}Z"

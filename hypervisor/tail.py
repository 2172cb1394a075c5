"""The last lines of a text somebody else writes: helper programs on stderr, the guest on its console.

The writer is not trusted. What is kept is bounded in lines and in bytes per line, and is printable text.
"""

from __future__ import annotations

import re
from collections import deque

TAIL_LINES = 50
LINE_BYTES = 1024

_TERMINAL_SEQUENCES = re.compile(r"\x1b(?:\[[0-9;?=]*[A-Za-z]|.)")


class LineTail:
    """Cuts a byte stream into lines and remembers the last of them.

    A line longer than `line_bytes` is cut; an unfinished last line counts as a line in `lines()`.
    """

    def __init__(self, *, max_lines: int = TAIL_LINES, line_bytes: int = LINE_BYTES) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._line_bytes = line_bytes
        self._partial = b""

    def feed(self, data: bytes) -> list[str]:
        """Take bytes as they come; return the lines they finished (empty lines are dropped)."""
        first, *rest = data.split(b"\n")
        finished = []
        self._partial = self._cut(self._partial + first)
        for piece in rest:
            if line := _printable(self._partial):
                finished.append(line)
            self._partial = self._cut(piece)
        self._lines.extend(finished)
        return finished

    def lines(self) -> list[str]:
        last = _printable(self._partial)
        return [*self._lines, last] if last else list(self._lines)

    def _cut(self, piece: bytes) -> bytes:
        return piece[: self._line_bytes]


def _printable(raw: bytes) -> str:
    text = _TERMINAL_SEQUENCES.sub("", raw.decode("utf-8", "replace")).replace("\t", " ").strip()
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)

"""Signals by number or by name."""

from __future__ import annotations

import re
import signal


def parse_signal(text: str) -> int:
    """With or without SIG, in any case; real-time signals as RTMIN+1. Raises ValueError."""
    if text.isdigit():
        number = int(text)
        if not 1 <= number < signal.NSIG:
            raise ValueError(f"unknown signal {text!r}")
        return number
    name = text.upper().removeprefix("SIG")
    offset = re.fullmatch(r"(RTMIN|RTMAX)([+-]\d+)", name)
    if offset:
        base = signal.SIGRTMIN if offset[1] == "RTMIN" else signal.SIGRTMAX
        number = base + int(offset[2])
        if not signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            raise ValueError(f"unknown signal {text!r}")
        return number
    found = signal.Signals.__members__.get(f"SIG{name}")
    if found is None:
        raise ValueError(f"unknown signal {text!r}")
    return int(found)

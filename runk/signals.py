"""Signals by number or by name."""

from __future__ import annotations

from oci_engine.c_modules import signal


def parse_signal(text: str) -> int:
    """With or without SIG, in any case; real-time signals as RTMIN+1. Raises ValueError."""
    number = int(text) if text.isascii() and text.isdigit() else _by_name(text.upper().removeprefix("SIG"))
    if not 1 <= number < signal.NSIG:
        raise ValueError(f"unknown signal {text!r}")
    return number


def _by_name(name: str) -> int:
    """0 for one that is not there."""
    for first, sign in (("RTMIN", "+"), ("RTMAX", "-")):
        offset = name.removeprefix(f"{first}{sign}")
        if offset != name and offset.isascii() and offset.isdigit():
            number = getattr(signal, f"SIG{first}") + int(f"{sign}{offset}")
            return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else 0
    found = getattr(signal, f"SIG{name}", 0)
    # Names that begin with SIG_ are no signals.
    return 0 if name.startswith("_") or not name else int(found)

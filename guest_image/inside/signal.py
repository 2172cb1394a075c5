# mypy: ignore-errors
"""Signals as plain numbers: making an enumeration of them costs as much as ten other modules."""

from _signal import *  # noqa: F403
from _signal import NSIG

Signals = int
_VALID = frozenset(range(1, NSIG))


def valid_signals():
    return _VALID

# mypy: ignore-errors
"""Signals as plain numbers: making an enumeration of them costs as much as ten other modules."""

from _signal import *  # noqa: F403

Signals = int

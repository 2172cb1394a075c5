# mypy: ignore-errors
"""The guest's agent has one thread."""

from _thread import RLock, get_ident
from _thread import _local as local
from _thread import allocate_lock as Lock

__all__ = ["Lock", "RLock", "current_thread", "get_ident", "local", "main_thread"]


class _MainThread:
    name = "MainThread"
    ident = get_ident()


_main = _MainThread()


def current_thread():
    return _main


main_thread = current_thread


def _shutdown():
    """Called by the interpreter when it ends."""

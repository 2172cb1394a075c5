"""Wake up when files of a cgroup change: out of memory, frozen, empty. One inotify descriptor for all of them."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING

from guest_agent import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

_EVENT = struct.Struct("iIII")
_IN_MODIFY = 2
_IN_IGNORED = 0x8000


class FileWatch:
    """Calls back when a watched file changes. The kernel reports changes of its cgroup event files this way."""

    def __init__(self) -> None:
        self._fd = syscalls.inotify_init()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def add(self, path: str, callback: Callable[[], None]) -> int:
        """Returns a handle for `remove`. Raises OSError when there is no such file."""
        handle = syscalls.inotify_add_watch(self._fd, path, _IN_MODIFY)
        self._callbacks[handle] = callback
        return handle

    def remove(self, handle: int) -> None:
        """Harmless when the file, and with it the watch, is gone."""
        if self._callbacks.pop(handle, None) is not None:
            syscalls.inotify_rm_watch(self._fd, handle)

    def _read(self) -> None:
        data = os.read(self._fd, 65536)
        changed, offset = [], 0
        while offset < len(data):
            handle, mask, _cookie, name_size = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + name_size
            if mask & _IN_IGNORED:
                self._callbacks.pop(handle, None)
            elif handle not in changed:
                changed.append(handle)
        for handle in changed:
            callback = self._callbacks.get(handle)
            if callback is not None:
                callback()


async def until(watch: FileWatch, path: str, condition: Callable[[], bool]) -> None:
    """Return when the condition holds; it is looked at now and whenever the file changes.

    One watch per path: the kernel gives a second one the handle of the first. Raises OSError without the file.
    """
    changed = asyncio.Event()
    handle = watch.add(path, changed.set)
    try:
        while not condition():
            changed.clear()
            await changed.wait()
    finally:
        watch.remove(handle)

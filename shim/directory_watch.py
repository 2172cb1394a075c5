"""The kernel's word that something has changed in a directory that a kubelet writes (inotify(7))."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from typing import TYPE_CHECKING

from shim.kubelet_files import is_news

if TYPE_CHECKING:
    from collections.abc import Callable

_EVENT = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200  # linux/inotify.h
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x4000, 0x8000, 0x1000000


class DirectoryWatch:
    """Calls back when a name in a watched directory appears, goes, or becomes another's, if that is news. One inotify
    descriptor for all of them: of these a user has few, see fs.inotify.max_user_instances."""

    def __init__(self) -> None:
        """Raises OSError: the host has no more of them to give."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def add(self, folder: int, changed: Callable[[], None]) -> int:
        """Watch a directory by a descriptor of it; returns a handle for `remove`. Raises OSError."""
        mask = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
        handle = self._checked(
            self._libc.inotify_add_watch(self._fd, b"/proc/self/fd/%d" % folder, ctypes.c_uint32(mask))
        )
        self._callbacks[handle] = changed
        return handle

    def remove(self, handle: int) -> None:
        """Harmless when the directory, and with it the watch, is gone."""
        if self._callbacks.pop(handle, None) is not None:
            self._libc.inotify_rm_watch(self._fd, handle)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            why = "cannot watch it by inotify; see fs.inotify.max_user_instances and max_user_watches"
            raise OSError(number, f"{os.strerror(number)}: {why}")
        return result

    def _read(self) -> None:
        data = os.read(self._fd, 65536)
        changed: dict[int, None] = {}
        offset = 0
        while offset < len(data):
            handle, mask, _, length = _EVENT.unpack_from(data, offset)
            name = data[offset + _EVENT.size :][:length].rstrip(b"\0").decode(errors="replace")
            offset += _EVENT.size + length
            if mask & _IN_Q_OVERFLOW:
                changed.update(dict.fromkeys(self._callbacks))
            elif mask & _IN_IGNORED:
                self._callbacks.pop(handle, None)
            elif is_news(name):
                changed[handle] = None
        for handle in changed:
            if (callback := self._callbacks.get(handle)) is not None:
                callback()

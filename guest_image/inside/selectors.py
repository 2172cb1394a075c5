# mypy: ignore-errors
"""The one selector that the event loop has: epoll, keys by descriptor."""

import select
from contextlib import suppress

EVENT_READ, EVENT_WRITE = 1, 2


class SelectorKey:
    __slots__ = ("data", "events", "fd", "fileobj")

    def __init__(self, fileobj, fd, events, data):
        self.fileobj = fileobj
        self.fd = fd
        self.events = events
        self.data = data


class EpollSelector:
    def __init__(self):
        self._epoll = select.epoll()
        self._keys = {}

    def register(self, fileobj, events, data=None):
        fd = _descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        self._epoll.register(fd, _mask(events))
        key = self._keys[fd] = SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj):
        key = self._keys.pop(self._registered(fileobj))
        with suppress(OSError):  # closed before, it is forgotten already
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj, events, data=None):
        fd = self._registered(fileobj)
        if self._keys[fd].events != events:
            self._epoll.modify(fd, _mask(events))
        key = self._keys[fd] = SelectorKey(fileobj, fd, events, data)
        return key

    def select(self, timeout=None):
        # Up to a whole millisecond: epoll would come back too early, and again and again.
        seconds = -1 if timeout is None else max(0, -(-timeout * 1000 // 1)) / 1000
        try:
            happened = self._epoll.poll(seconds, len(self._keys) or 1)
        except InterruptedError:
            return []
        ready = []
        for fd, mask in happened:
            key = self._keys.get(fd)
            if key is not None:
                # Errors and the other side's end concern reader and writer.
                events = (EVENT_READ if mask & ~select.EPOLLOUT else 0) | (
                    EVENT_WRITE if mask & ~select.EPOLLIN else 0
                )
                ready.append((key, events & key.events))
        return ready

    def get_key(self, fileobj):
        return self._keys[self._registered(fileobj)]

    def get_map(self):
        return self._keys

    def _registered(self, fileobj):
        try:
            return _descriptor(fileobj)
        except ValueError:
            for key in self._keys.values():
                if key.fileobj is fileobj:
                    return key.fd
            raise

    def close(self):
        self._epoll.close()
        self._keys.clear()


def _descriptor(fileobj):
    fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    if fd < 0:
        raise ValueError(f"{fileobj!r} is closed")
    return fd


def _mask(events):
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)


DefaultSelector = EpollSelector

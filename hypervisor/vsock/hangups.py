"""Notice that a host has closed its socket although we do not read from it.

The socket of a half-closed stream is readable for ever, so the event loop cannot watch it without
spinning. An epoll instance of its own, asked for no event at all, still reports a hang-up.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hypervisor.vsock.flows import Flow


class Hangups:
    """The watched flows; `on_hangup(flow)` is called once both directions of a flow's socket are closed."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        guarded: Callable[..., Callable[[], None]],
        on_hangup: Callable[[Flow], None],
    ) -> None:
        self._loop = loop
        self._on_hangup = on_hangup
        self._flows: dict[int, Flow] = {}
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), guarded(self._on_events))

    def watch(self, flow: Flow) -> bool:
        """Watch `flow`; True when it has hung up already."""
        fd = flow.sock.fileno()
        if fd not in self._flows:
            self._flows[fd] = flow
            self._epoll.register(fd, 0)
        poll = select.poll()
        poll.register(fd, 0)
        return bool(poll.poll(0))

    def unwatch(self, flow: Flow) -> None:
        fd = flow.sock.fileno()
        if self._flows.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _on_events(self) -> None:
        # One at a time: what follows from a hang-up may unwatch others that the same poll would report.
        while events := self._epoll.poll(0, 1):
            flow = self._flows[events[0][0]]
            self.unwatch(flow)
            self._on_hangup(flow)

"""What goes to the hosts: bytes of the guest, straight from its memory into the host's socket.

Only what a slow reader leaves behind is copied. It waits in the flow's backlog, which the flow's credit
bounds: credit comes back as the host takes bytes, so a slow reader stalls its own stream and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypervisor.vsock.packet import window

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hypervisor.vsock.flows import Flow

_MAX_PIECES: Final = 512  # per write; the system call takes 1024 (IOV_MAX)


class HostOutlet:
    """Writes to the sockets of flows.

    `guarded(function, *args)` makes a callback that the event loop may run. `on_taken(flow)` is called when the
    host took bytes in a turn of its own, `on_empty(flow)` when that was the last of the backlog,
    `on_deaf(flow)` when the host takes no more. A deaf flow must not be given anything.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        guarded: Callable[..., Callable[[], None]],
        *,
        on_taken: Callable[[Flow], None],
        on_empty: Callable[[Flow], None],
        on_deaf: Callable[[Flow], None],
    ) -> None:
        self.bytes_taken = 0
        self._loop = loop
        self._guarded = guarded
        self._on_taken = on_taken
        self._on_empty = on_empty
        self._on_deaf = on_deaf

    def deliver(self, flow: Flow, views: list[memoryview], length: int) -> None:
        """Pass on `views`, which are `length` bytes in all and the guest's again afterwards."""
        sent = 0
        if not flow.backlog and length:
            try:
                sent = flow.sock.send(views[0]) if len(views) == 1 else flow.sock.sendmsg(views[:_MAX_PIECES])
            except BlockingIOError:
                pass
            except OSError:
                self._on_deaf(flow)
                return
        self._took(flow, sent)
        if sent < length:
            if not flow.backlog:
                self._loop.add_writer(flow.sock, self._guarded(self._on_writable, flow))
            for view in window(views, sent, length - sent):
                flow.backlog += view

    def drain(self, flow: Flow) -> None:
        """Pass on what the host takes of the backlog now; the rest follows by itself."""
        try:
            with memoryview(flow.backlog) as view:
                sent = flow.sock.send(view)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._on_deaf(flow)
            return
        del flow.backlog[:sent]
        self._took(flow, sent)
        if flow.backlog:
            self._loop.add_writer(flow.sock, self._guarded(self._on_writable, flow))
        else:
            self._loop.remove_writer(flow.sock)
            self._on_empty(flow)

    def forget(self, flow: Flow) -> None:
        """Throw the backlog away."""
        self._loop.remove_writer(flow.sock)
        flow.backlog.clear()

    def _on_writable(self, flow: Flow) -> None:
        self.drain(flow)
        self._on_taken(flow)

    def _took(self, flow: Flow, count: int) -> None:
        self.bytes_taken += count
        flow.free(count)

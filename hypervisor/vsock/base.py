"""The contract of a vsock transport as the host sees it. Ports are 32-bit numbers, streams are stream
sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import TypeAlias

    OnConnection: TypeAlias = Callable[[socket.socket], None]

HOST_CID = 2
"""The address under which every guest reaches its host."""
FIRST_GUEST_CID = 3


class Vsock(Protocol):
    """Both directions of the stream traffic with one guest. All methods belong to the event loop's thread."""

    async def connect(self, port: int) -> socket.socket:
        """Connect to `port` of the guest; the socket is connected, non-blocking, and the caller's.

        Waits while the guest's driver is not up yet, without limit: the caller sets one.
        Raises ConnectionRefusedError when the guest is up and nothing listens there, ConnectionResetError
        when the guest is gone.
        """
        ...

    def listen(self, port: int, on_connection: OnConnection) -> None:
        """Accept what this guest connects to `port` of the host; nobody else's connections are passed on.

        `on_connection` gets a connected, non-blocking socket and owns it. Raises OSError when the port is
        taken.
        """
        ...

    async def aclose(self) -> None:
        """Stop listening, fail pending connects with ConnectionResetError. Repeating it is harmless."""
        ...

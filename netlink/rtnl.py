"""The rtnetlink socket: one method for each question and order. Calls return when the kernel has answered.

The kernel does the work inside of the sending call, so there is nothing to wait for: a call is microseconds, unless
somebody else is changing the same machine's network at that moment.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from netlink import objects, wire
from netlink.objects import Address, Link, Neighbour
from netlink.routes import ROUTE, RT_SCOPE_UNIVERSE, Route, is_cached

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_ROUTE = 0  # <linux/netlink.h>
# <linux/rtnetlink.h>
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
# Multicast groups: links, neighbours; addresses, routes and rules of IPv4, and of IPv6.
CHANGES = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
# A dump's messages are at most this long; <linux/netlink.h> says 8 KiB, large pages make it 32.
_RECEIVE_BYTES = 32768
_DUMP_ATTEMPTS = 5


class Rtnetlink:
    """A socket in the network namespace that the process was in when it was made. A context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Harmless when repeated."""
        self._socket.close()

    def links(self) -> list[Link]:
        """all interfaces, by index. Raises OSError, as every method here."""
        return [Link.decode(body) for body in self.dump(RTM_GETLINK, bytes(objects.IFINFO.size), RTM_NEWLINK)]

    def addresses(self) -> list[Address]:
        """All addresses of all interfaces."""
        return [
            Address.decode(body) for body in self.dump(RTM_GETADDR, bytes(objects.IFADDR.size), RTM_NEWADDR)
        ]

    def lasting_addresses(self) -> list[Address]:
        """Those of everywhere that somebody has given an interface for good, not those that it made up for itself."""
        found = []
        for body in self.dump(RTM_GETADDR, bytes(objects.IFADDR.size), RTM_NEWADDR):
            _, _, flags, scope, _ = objects.IFADDR.unpack_from(body)
            if flags & objects.IFA_F_PERMANENT and scope == RT_SCOPE_UNIVERSE:
                found.append(Address.decode(body))
        return found

    def routes(self) -> list[Route]:
        """The routes of IPv4 and IPv6 in all tables, the kernel's own included."""
        found = self.dump(RTM_GETROUTE, bytes(ROUTE.size), RTM_NEWROUTE)
        routes = (Route.decode(body) for body in found if not is_cached(body))
        return [route for route in routes if route.family in (socket.AF_INET, socket.AF_INET6)]

    def neighbours(self) -> list[Neighbour]:
        """All neighbours that have an address."""
        found = [
            Neighbour.decode(body)
            for body in self.dump(RTM_GETNEIGH, bytes(objects.NEIGHBOUR.size), RTM_NEWNEIGH)
        ]
        return [neighbour for neighbour in found if neighbour.address]

    def set_link(
        self, ifindex: int, *, name: str = "", mtu: int = 0, up: bool | None = None, arp: bool | None = None
    ) -> None:
        """Change an interface's name, MTU in bytes, whether it is up, whether it asks for MAC addresses."""
        self.order(RTM_NEWLINK, 0, objects.link_request(ifindex, name=name, mtu=mtu, up=up, arp=arp))

    def move_link(self, ifindex: int, name: str, namespace: int) -> None:
        """Move an interface to an open network namespace, where it has this name, is down and has no addresses."""
        self.order(RTM_NEWLINK, 0, objects.move_link_request(ifindex, name, namespace))

    def add_link(self, name: str, kind: str) -> None:
        """Make an interface of a kind that needs no settings, such as `ifb`."""
        flags = wire.NLM_F_CREATE | wire.NLM_F_EXCL
        self.order(RTM_NEWLINK, flags, objects.new_link_request(name, kind))

    def add_macvtap(self, name: str, parent: int) -> None:
        """Make a macvtap that takes over the traffic of the interface with the index `parent`, with its MAC address."""
        flags = wire.NLM_F_CREATE | wire.NLM_F_EXCL
        self.order(RTM_NEWLINK, flags, objects.new_macvtap_request(name, parent))

    def delete_link(self, ifindex: int) -> None:
        """Remove an interface."""
        self.order(RTM_DELLINK, 0, objects.IFINFO.pack(0, 0, ifindex, 0, 0))

    def add_address(self, address: Address) -> None:
        """Give an interface an address; one that it has already is fine."""
        self.order(RTM_NEWADDR, wire.NLM_F_CREATE | wire.NLM_F_REPLACE, address.encode())

    def delete_address(self, address: Address) -> None:
        """Take an address away."""
        self.order(RTM_DELADDR, 0, address.encode())

    def add_route(self, route: Route) -> None:
        """Add a route, in place of one with the same destination and metric."""
        self.order(RTM_NEWROUTE, wire.NLM_F_CREATE | wire.NLM_F_REPLACE, route.encode())

    def append_route(self, route: Route) -> None:
        """Add a route beside those with the same destination and metric. One that is there already is EEXIST."""
        self.order(RTM_NEWROUTE, wire.NLM_F_CREATE | wire.NLM_F_APPEND, route.encode())

    def delete_route(self, route: Route) -> None:
        """Remove a route."""
        self.order(RTM_DELROUTE, 0, route.encode())

    def add_neighbour(self, neighbour: Neighbour) -> None:
        """Add a neighbour, in place of one with the same address."""
        self.order(RTM_NEWNEIGH, wire.NLM_F_CREATE | wire.NLM_F_REPLACE, neighbour.encode())

    def delete_neighbour(self, neighbour: Neighbour) -> None:
        """Remove a neighbour."""
        self.order(RTM_DELNEIGH, 0, neighbour.encode())

    def order(self, kind: int, flags: int, body: bytes) -> None:
        """Send an order and take the kernel's answer."""
        sequence = self._send(kind, wire.NLM_F_REQUEST | wire.NLM_F_ACK | flags, body)
        for message in self._answers(sequence):
            if message.kind == wire.NLMSG_ERROR:
                _check(message)
                return

    def dump(self, kind: int, body: bytes, wanted: int) -> list[bytes]:
        """The bodies of all messages of type `wanted` that answer a question."""
        for _ in range(_DUMP_ATTEMPTS):
            found, whole = self._dump_once(kind, body, wanted)
            if whole:
                break
        return found

    def _dump_once(self, kind: int, body: bytes, wanted: int) -> tuple[list[bytes], bool]:
        """What there is, and whether nothing changed in the middle of the telling."""
        sequence = self._send(kind, wire.NLM_F_REQUEST | wire.NLM_F_DUMP, body)
        found: list[bytes] = []
        whole = True
        for message in self._answers(sequence):
            whole = whole and not message.flags & wire.NLM_F_DUMP_INTR
            if message.kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                _check(message)
                break
            if message.kind == wanted:
                found.append(message.body)
        return found, whole

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence += 1
        self._socket.send(wire.pack(kind, flags, self._sequence, body))
        return self._sequence

    def _answers(self, sequence: int) -> Iterator[wire.Message]:
        while True:
            for message in wire.unpack(self._socket.recv(_RECEIVE_BYTES)):
                if message.sequence == sequence:
                    yield message


def changes() -> socket.socket:
    """A socket that becomes readable when an interface, address, route, rule or neighbour has changed.

    Made in the current network namespace; does not block. What exactly has changed is better asked for: messages are
    lost when many come at once. `drain` empties it.
    """
    sock = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        _NETLINK_ROUTE,
    )
    sock.bind((0, CHANGES))
    return sock


def drain(sock: socket.socket) -> None:
    """Take all that has been told so far."""
    while True:
        try:
            sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as err:
            if err.errno != errno.ENOBUFS:  # more was told than fits: asking again is what we do anyway
                raise


def _check(message: wire.Message) -> None:
    if error := wire.error_of(message):
        raise OSError(error, os.strerror(error))

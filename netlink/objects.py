"""What the kernel tells of a network, as plain tuples, and back into its words.

Addresses are text as people write them, without a prefix; MAC addresses are lower case with colons. A destination is
`address/prefix`, and empty for everything.
"""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TYPE_CHECKING, NamedTuple

from netlink.wire import attribute, attributes, number, text

if TYPE_CHECKING:
    from collections.abc import Iterable

# Flags of an interface, <linux/if.h>.
IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
NUD_PERMANENT = 0x80
#: What the IPv6 addresses begin with that a kernel gives its interfaces by itself.
LINK_LOCAL = "fe80:"
# Flags of an address, <linux/if_addr.h>.
IFA_F_NODAD, IFA_F_HOMEADDRESS, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x02, 0x10, 0x20, 0x80
IFA_F_NOPREFIXROUTE, IFA_F_MCAUTOJOIN = 0x200, 0x400

# Structures at the head of the messages: ifinfomsg, ifaddrmsg and ndmsg of rtnetlink(7).
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
NEIGHBOUR = struct.Struct("=BxxxiHBB")
_LIFETIMES = struct.Struct("=IIII")  # ifa_cacheinfo: preferred, valid, and two times

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO = 1, 3, 4, 5, 18
_IFLA_NET_NS_FD = 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# <linux/if_link.h>: the one macvtap that an interface then has gets all that comes, and has its MAC address.
_IFLA_MACVLAN_MODE, _MACVLAN_MODE_PASSTHRU = 1, 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST = 1, 2, 3, 4
_IFA_CACHEINFO, _IFA_FLAGS, _IFA_RT_PRIORITY = 6, 8, 9
# Flags that somebody sets, and one that is a state which others see; the rest is between the kernel and itself.
_TOLD_FLAGS = IFA_F_HOMEADDRESS | IFA_F_DEPRECATED | IFA_F_NOPREFIXROUTE | IFA_F_MCAUTOJOIN
_FOREVER = 0xFFFFFFFF
_NDA_DST, _NDA_LLADDR = 1, 2


class Link(NamedTuple):
    """An interface. `kind` is the kernel's word for its driver (`veth`, `vlan`, ...), empty for hardware."""

    ifindex: int
    name: str
    mac: str
    mtu: int
    flags: int
    kind: str

    @classmethod
    def decode(cls, body: bytes) -> Link:
        """From an RTM_NEWLINK or RTM_DELLINK."""
        _, _, ifindex, flags, _ = IFINFO.unpack_from(body)
        found = attributes(body[IFINFO.size :])
        info = attributes(found.get(_IFLA_LINKINFO, b""))
        return cls(
            ifindex,
            text(found.get(_IFLA_IFNAME)),
            found.get(_IFLA_ADDRESS, b"").hex(":"),
            number(found.get(_IFLA_MTU)),
            flags,
            text(info.get(_IFLA_INFO_KIND)),
        )


class Address(NamedTuple):
    """One address of an interface. On a link between two points `peer` is the other one, else it is empty.

    How long it lives is not told: it is there, and preferred (without IFA_F_DEPRECATED), until the kernel says that it
    is not. `metric` is that of the route to its network.
    """

    ifindex: int
    family: int
    address: str
    prefix: int
    peer: str = ""
    broadcast: str = ""
    label: str = ""
    scope: int = 0
    flags: int = 0
    metric: int = 0

    @property
    def key(self) -> tuple[int, int, str, int]:
        """What makes it the same address, whatever its attributes are."""
        return self.ifindex, self.family, self.address, self.prefix

    @classmethod
    def decode(cls, body: bytes) -> Address:
        """From an RTM_NEWADDR or RTM_DELADDR."""
        family, prefix, flags, scope, ifindex = IFADDR.unpack_from(body)
        found = attributes(body[IFADDR.size :])
        given = address_text(family, found.get(_IFA_ADDRESS))
        local = address_text(family, found.get(_IFA_LOCAL)) or given
        return cls(
            ifindex,
            family,
            local,
            prefix,
            given if given != local else "",
            address_text(family, found.get(_IFA_BROADCAST)),
            text(found.get(_IFA_LABEL)),
            scope,
            number(found.get(_IFA_FLAGS), flags) & _TOLD_FLAGS,
            number(found.get(_IFA_RT_PRIORITY)),
        )

    def encode(self) -> bytes:
        """For RTM_NEWADDR and RTM_DELADDR. IPv6 addresses are used at once: that nobody else has them is known."""
        packed = inet_pton(self.family, self.address)
        other = inet_pton(self.family, self.peer) if self.peer else packed
        words = attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, other)
        flags = self.flags & ~IFA_F_DEPRECATED
        if self.family == AF_INET6:
            flags |= IFA_F_NODAD | IFA_F_PERMANENT
        words += attribute(_IFA_FLAGS, flags)
        if self.flags & IFA_F_DEPRECATED:
            words += attribute(_IFA_CACHEINFO, _LIFETIMES.pack(0, _FOREVER, 0, 0))
        if self.broadcast:
            words += attribute(_IFA_BROADCAST, inet_pton(self.family, self.broadcast))
        if self.label:
            words += attribute(_IFA_LABEL, self.label)
        if self.metric:
            words += attribute(_IFA_RT_PRIORITY, self.metric)
        return IFADDR.pack(self.family, self.prefix, 0, self.scope, self.ifindex) + words


def in_order_of_making(addresses: Iterable[Address]) -> list[Address]:
    """So that the kernel tells them in the given order, in which it chooses among them for packets of its own.

    It puts a new IPv4 address behind the others, and a new IPv6 address before them.
    """
    order: list[Address] = []
    for address in addresses:
        order.insert(0 if address.family == AF_INET6 else len(order), address)
    return order


def usual_broadcast(family: int, address: str, prefix: int) -> str:
    """The broadcast address of an IPv4 network; empty where there is none."""
    if family != AF_INET or prefix > 30:
        return ""
    packed = struct.unpack("!I", inet_pton(AF_INET, address))[0] | ((1 << (32 - prefix)) - 1)
    return inet_ntop(AF_INET, struct.pack("!I", packed))


class Neighbour(NamedTuple):
    """An address on the link of an interface, and the MAC address it has there."""

    ifindex: int
    family: int
    address: str
    mac: str
    state: int
    flags: int

    @classmethod
    def decode(cls, body: bytes) -> Neighbour:
        """From an RTM_NEWNEIGH or RTM_DELNEIGH."""
        family, ifindex, state, flags, _ = NEIGHBOUR.unpack_from(body)
        found = attributes(body[NEIGHBOUR.size :])
        address = address_text(family, found.get(_NDA_DST))
        return cls(ifindex, family, address, found.get(_NDA_LLADDR, b"").hex(":"), state, flags)

    def encode(self) -> bytes:
        """For RTM_NEWNEIGH. Raises ValueError, OSError for addresses that are none."""
        words = attribute(_NDA_DST, inet_pton(self.family, self.address))
        if self.mac:
            words += attribute(_NDA_LLADDR, mac_bytes(self.mac))
        return NEIGHBOUR.pack(self.family, self.ifindex, self.state, self.flags, 0) + words


def link_request(
    ifindex: int, *, name: str = "", mtu: int = 0, up: bool | None = None, arp: bool | None = None
) -> bytes:
    """The body of an RTM_NEWLINK that changes what is given."""
    flags = (IFF_UP if up else 0) | (IFF_NOARP if arp is False else 0)
    change = (IFF_UP if up is not None else 0) | (IFF_NOARP if arp is not None else 0)
    words = attribute(_IFLA_IFNAME, name) if name else b""
    if mtu:
        words += attribute(_IFLA_MTU, mtu)
    return IFINFO.pack(0, 0, ifindex, flags, change) + words


def move_link_request(ifindex: int, name: str, namespace: int) -> bytes:
    """The body of an RTM_NEWLINK that moves an interface to an open network namespace, under a name."""
    words = attribute(_IFLA_NET_NS_FD, namespace) + attribute(_IFLA_IFNAME, name)
    return IFINFO.pack(0, 0, ifindex, 0, 0) + words


def new_link_request(name: str, kind: str) -> bytes:
    """The body of an RTM_NEWLINK that makes an interface of a kind without settings."""
    info = attribute(_IFLA_INFO_KIND, kind)
    return bytes(IFINFO.size) + attribute(_IFLA_IFNAME, name) + attribute(_IFLA_LINKINFO, info)


def new_macvtap_request(name: str, parent: int) -> bytes:
    """The body of an RTM_NEWLINK that makes a macvtap on the interface with the index `parent`."""
    settings = attribute(_IFLA_MACVLAN_MODE, _MACVLAN_MODE_PASSTHRU)
    info = attribute(_IFLA_INFO_KIND, "macvtap") + attribute(_IFLA_INFO_DATA, settings)
    words = (attribute(_IFLA_IFNAME, name), attribute(_IFLA_LINK, parent), attribute(_IFLA_LINKINFO, info))
    return bytes(IFINFO.size) + b"".join(words)


def mac_bytes(mac: str) -> bytes:
    """The six bytes of a MAC address. Raises ValueError."""
    packed = bytes.fromhex(mac.replace(":", ""))
    if len(packed) != 6:
        raise ValueError(f"{mac!r} is no MAC address")
    return packed


def network_of(family: int, address: str, prefix: int) -> str:
    """The network that an address is in, as `address/prefix`."""
    packed = inet_pton(family, address)
    host_bits = full_prefix(family) - prefix
    first = int.from_bytes(packed, "big") >> host_bits << host_bits
    return f"{inet_ntop(family, first.to_bytes(len(packed), 'big'))}/{prefix}"


def address_text(family: int, packed: bytes | None) -> str:
    """An address as text; empty for none, or for what is none of that family."""
    if not packed or len(packed) != full_prefix(family) // 8:
        return ""
    return inet_ntop(family, packed)


def prefix_text(family: int, packed: bytes | None, bits: int) -> str:
    """`address/prefix`, empty without an address."""
    address = address_text(family, packed)
    return f"{address}/{bits}" if address else ""


def full_prefix(family: int) -> int:
    """The bits of an address."""
    return 32 if family == AF_INET else 128

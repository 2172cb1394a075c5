"""What the kernel tells of a network, as plain tuples, and back into its words.

Addresses are text as people write them, without a prefix; MAC addresses are lower case with colons. A destination is
`address/prefix`, and empty for everything.
"""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from netlink.wire import attribute, attributes, number, text

# Flags of an interface, <linux/if.h>.
IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
# Who made a route, <linux/rtnetlink.h>: the kernel itself, for an interface's addresses.
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_RA = 2, 3, 9
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST = 1
RT_TABLE_MAIN = 254
NUD_PERMANENT = 0x80
IFA_F_NODAD, IFA_F_PERMANENT = 0x02, 0x80

# Structures at the head of the messages: ifinfomsg, ifaddrmsg, rtmsg and ndmsg of rtnetlink(7).
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
ROUTE = struct.Struct("=BBBBBBBBI")
NEIGHBOUR = struct.Struct("=BxxxiHBB")
# One of a route's several ways, rtnexthop of <linux/rtnetlink.h>: length, flags, weight, interface.
_WAY = struct.Struct("=HBBi")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO = 1, 3, 4, 5, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# <linux/if_link.h>: the one macvtap that an interface then has gets all that comes, and has its MAC address.
_IFLA_MACVLAN_MODE, _MACVLAN_MODE_PASSTHRU = 1, 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_TABLE = 1, 4, 5, 6, 7, 8, 15
_RTA_MULTIPATH = 9
_RTAX_MTU = 2
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
    """One address of an interface. On a link between two points `peer` is the other one, else it is empty."""

    ifindex: int
    family: int
    address: str
    prefix: int
    peer: str = ""

    @classmethod
    def decode(cls, body: bytes) -> Address:
        """From an RTM_NEWADDR or RTM_DELADDR."""
        family, prefix, _, _, ifindex = IFADDR.unpack_from(body)
        found = attributes(body[IFADDR.size :])
        given = _text_of(family, found.get(_IFA_ADDRESS))
        local = _text_of(family, found.get(_IFA_LOCAL)) or given
        return cls(ifindex, family, local, prefix, given if given != local else "")

    def encode(self) -> bytes:
        """For RTM_NEWADDR and RTM_DELADDR. IPv6 addresses are used at once: that nobody else has them is known."""
        packed = inet_pton(self.family, self.address)
        words = attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
        if self.family == AF_INET6:
            words += attribute(_IFA_FLAGS, IFA_F_NODAD | IFA_F_PERMANENT)
        elif self.prefix < 31:
            host_bits = (1 << (32 - self.prefix)) - 1
            words += attribute(_IFA_BROADCAST, struct.pack("!I", struct.unpack("!I", packed)[0] | host_bits))
        return IFADDR.pack(self.family, self.prefix, 0, 0, self.ifindex) + words


class Route(NamedTuple):
    """One route of the main table. `ifindex` is its interface, 0 when it has none; of several ways it is the first."""

    family: int
    destination: str
    gateway: str
    ifindex: int
    source: str
    scope: int
    protocol: int
    flags: int
    metric: int
    mtu: int
    table: int = RT_TABLE_MAIN
    kind: int = RTN_UNICAST

    @classmethod
    def decode(cls, body: bytes) -> Route:
        """From an RTM_NEWROUTE or RTM_DELROUTE."""
        family, bits, _, _, table, protocol, scope, kind, flags = ROUTE.unpack_from(body)
        found = attributes(body[ROUTE.size :])
        destination = _text_of(family, found.get(_RTA_DST))
        way, ifindex = found, number(found.get(_RTA_OIF))
        if several := found.get(_RTA_MULTIPATH):
            length, way_flags, _, ifindex = _WAY.unpack_from(several)
            way, flags = attributes(several[_WAY.size : length]), flags | way_flags
        return cls(
            family,
            f"{destination}/{bits}" if destination else "",
            _text_of(family, way.get(_RTA_GATEWAY)),
            ifindex,
            _text_of(family, found.get(_RTA_PREFSRC)),
            scope,
            protocol,
            flags,
            number(found.get(_RTA_PRIORITY)),
            number(attributes(found.get(_RTA_METRICS, b"")).get(_RTAX_MTU)),
            number(found.get(_RTA_TABLE), table),
            kind,
        )

    def encode(self) -> bytes:
        """For RTM_NEWROUTE and RTM_DELROUTE. Raises ValueError, OSError for addresses that are none."""
        address, _, bits = self.destination.partition("/")
        words = attribute(_RTA_DST, inet_pton(self.family, address)) if address else b""
        if self.gateway:
            words += attribute(_RTA_GATEWAY, inet_pton(self.family, self.gateway))
        if self.ifindex:
            words += attribute(_RTA_OIF, self.ifindex)
        if self.source:
            words += attribute(_RTA_PREFSRC, inet_pton(self.family, self.source))
        if self.metric:
            words += attribute(_RTA_PRIORITY, self.metric)
        if self.mtu:
            words += attribute(_RTA_METRICS, attribute(_RTAX_MTU, self.mtu))
        full = 32 if self.family == AF_INET else 128
        head = (self.family, int(bits or full) if address else 0, 0, 0, RT_TABLE_MAIN)
        return ROUTE.pack(*head, self.protocol, self.scope, self.kind, self.flags) + words


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
        address = _text_of(family, found.get(_NDA_DST))
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


def _text_of(family: int, packed: bytes | None) -> str:
    if not packed or len(packed) != (4 if family == AF_INET else 16):
        return ""
    return inet_ntop(family, packed)

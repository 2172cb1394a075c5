"""Routes (rtnetlink(7), RTM_NEWROUTE) as plain tuples, and back into the kernel's words."""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, NamedTuple

from netlink.objects import address_text, full_prefix, prefix_text
from netlink.wire import attribute, attributes, number

if TYPE_CHECKING:
    from collections.abc import Iterator

# Who made a route, <linux/rtnetlink.h>: a redirection, the kernel for an interface's addresses, somebody, a router.
RTPROT_REDIRECT, RTPROT_KERNEL, RTPROT_BOOT, RTPROT_RA = 1, 2, 3, 9
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
# What becomes of a packet: it is sent, or is for this machine, or is dropped, with or without an answer, or the next
# rule is asked.
RTN_UNICAST, RTN_LOCAL, RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW = 1, 2, 6, 7, 8, 9
#: Kinds that lead nowhere.
NOWHERE = (RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW)
RT_TABLE_COMPAT, RT_TABLE_DEFAULT, RT_TABLE_MAIN, RT_TABLE_LOCAL = 252, 253, 254, 255
#: The only flag of a way that somebody sets; the others tell a state.
ONLINK = 4
#: The metric of IPv6 routes that are given none.
IPV6_METRIC = 1024
RTAX_MTU = 2

ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg
_WAY = struct.Struct("=HBBi")  # rtnexthop: length, flags, weight less one, interface
_VIA = struct.Struct("=H")  # rtvia: a family, then an address of it
_CLONED = 0x200
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS = 1, 2, 4, 5, 6, 7, 8
_RTA_MULTIPATH, _RTA_CACHEINFO, _RTA_TABLE, _RTA_VIA, _RTA_PREF = 9, 12, 15, 18, 20
_RTA_EXPIRES, _RTA_PAD, _RTA_NH_ID = 23, 24, 30
# What is not told on: what the kernel counts, and names of objects whose contents are told too.
_SAID = {
    *(_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH),
    *(_RTA_CACHEINFO, _RTA_TABLE, _RTA_VIA, _RTA_PREF, _RTA_EXPIRES, _RTA_PAD, _RTA_NH_ID),
}
_METRIC_BYTES = 4


class Way(NamedTuple):
    """Where a route leads: an interface, and a gateway on it unless all is reached directly.

    The gateway of an IPv4 route may have an IPv6 address.
    """

    ifindex: int
    gateway: str = ""
    flags: int = 0
    weight: int = 1


class Route(NamedTuple):
    """One route. `ways` has several when packets are shared out among them, and none for kinds that lead nowhere.

    `destination` and `origin` are `address/prefix`, empty for everything; `source` is the address that own packets get.
    `metrics` are numbers (RTAX_...) with values; `rest` says which attributes of the kernel's are not told here.
    """

    family: int
    destination: str
    ways: tuple[Way, ...]
    source: str = ""
    scope: int = RT_SCOPE_UNIVERSE
    protocol: int = RTPROT_BOOT
    metric: int = 0
    metrics: tuple[tuple[int, int], ...] = ()
    table: int = RT_TABLE_MAIN
    kind: int = RTN_UNICAST
    tos: int = 0
    origin: str = ""
    preference: int = 0
    rest: tuple[int, ...] = ()

    @property
    def ifindex(self) -> int:
        """The first way's interface; 0 without one."""
        return self.ways[0].ifindex if self.ways else 0

    @property
    def gateway(self) -> str:
        """The first way's gateway."""
        return self.ways[0].gateway if self.ways else ""

    @property
    def flags(self) -> int:
        """The first way's flags."""
        return self.ways[0].flags if self.ways else 0

    @property
    def mtu(self) -> int:
        """0 for that of the interface."""
        return dict(self.metrics).get(RTAX_MTU, 0)

    @classmethod
    def decode(cls, body: bytes) -> Route:
        """From an RTM_NEWROUTE or RTM_DELROUTE."""
        family, bits, origin_bits, tos, table, protocol, scope, kind, flags = ROUTE.unpack_from(body)
        found = attributes(body[ROUTE.size :])
        rest = set(found) - _SAID
        ways: tuple[Way, ...] = ()
        if several := found.get(_RTA_MULTIPATH):
            ways = tuple(_ways(family, several, rest))
        elif kind not in NOWHERE and (_RTA_OIF in found or _RTA_GATEWAY in found or _RTA_VIA in found):
            ways = (Way(number(found.get(_RTA_OIF)), _gateway(family, found), flags & ONLINK),)
        metrics, more = _metrics(found.get(_RTA_METRICS, b""))
        return cls(
            family,
            prefix_text(family, found.get(_RTA_DST), bits),
            ways,
            address_text(family, found.get(_RTA_PREFSRC)),
            scope,
            protocol,
            number(found.get(_RTA_PRIORITY)),
            metrics,
            number(found.get(_RTA_TABLE), table),
            kind,
            tos,
            prefix_text(family, found.get(_RTA_SRC), origin_bits),
            number(found.get(_RTA_PREF)),
            (*sorted(rest), *more),
        )

    def encode(self) -> bytes:
        """For RTM_NEWROUTE and RTM_DELROUTE. Raises ValueError, OSError for addresses that are none."""
        bits, packed = _packed_prefix(self.family, self.destination)
        origin_bits, origin = _packed_prefix(self.family, self.origin)
        words = attribute(_RTA_TABLE, self.table)
        if packed:
            words += attribute(_RTA_DST, packed)
        if origin:
            words += attribute(_RTA_SRC, origin)
        if len(self.ways) > 1:
            words += attribute(_RTA_MULTIPATH, b"".join(_encoded(self.family, way) for way in self.ways))
        elif self.ways:
            words += _gateway_words(self.family, self.gateway)
            if self.ifindex:
                words += attribute(_RTA_OIF, self.ifindex)
        if self.source:
            words += attribute(_RTA_PREFSRC, inet_pton(self.family, self.source))
        if self.metric:
            words += attribute(_RTA_PRIORITY, self.metric)
        if self.metrics:
            words += attribute(_RTA_METRICS, b"".join(attribute(*entry) for entry in self.metrics))
        if self.preference:
            words += attribute(_RTA_PREF, bytes([self.preference]))
        table = self.table if self.table < 256 else RT_TABLE_COMPAT
        flags = self.flags if len(self.ways) == 1 else 0
        return (
            ROUTE.pack(
                *(
                    self.family,
                    bits,
                    origin_bits,
                    self.tos,
                    table,
                    self.protocol,
                    self.scope,
                    self.kind,
                    flags,
                )
            )
            + words
        )


def is_cached(body: bytes) -> bool:
    """Whether an RTM_NEWROUTE is no route but what the kernel has learned of one destination."""
    return bool(ROUTE.unpack_from(body)[-1] & _CLONED)


def _ways(family: int, several: bytes, rest: set[int]) -> Iterator[Way]:
    at = 0
    while len(several) - at >= _WAY.size:
        length, flags, less_one, ifindex = _WAY.unpack_from(several, at)
        found = attributes(several[at + _WAY.size : at + length])
        rest.update(set(found) - _SAID)
        yield Way(ifindex, _gateway(family, found), flags & ONLINK, less_one + 1)
        at += max((length + 3) & ~3, _WAY.size)


def _encoded(family: int, way: Way) -> bytes:
    words = _gateway_words(family, way.gateway)
    return _WAY.pack(_WAY.size + len(words), way.flags, way.weight - 1, way.ifindex) + words


def _gateway(family: int, found: dict[int, bytes]) -> str:
    via = found.get(_RTA_VIA, b"")
    if len(via) > _VIA.size:
        return address_text(_VIA.unpack_from(via)[0], via[_VIA.size :])
    return address_text(family, found.get(_RTA_GATEWAY))


def _gateway_words(family: int, gateway: str) -> bytes:
    if not gateway:
        return b""
    if family == AF_INET and ":" in gateway:
        return attribute(_RTA_VIA, _VIA.pack(AF_INET6) + inet_pton(AF_INET6, gateway))
    return attribute(_RTA_GATEWAY, inet_pton(family, gateway))


def _metrics(packed: bytes) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Those that are numbers; and, if there are others, the attribute that they are part of."""
    found = attributes(packed)
    numbers = ((kind, number(data)) for kind, data in sorted(found.items()) if len(data) == _METRIC_BYTES)
    others = any(len(data) != _METRIC_BYTES for data in found.values())
    return tuple(numbers), (_RTA_METRICS,) if others else ()


def _packed_prefix(family: int, text: str) -> tuple[int, bytes]:
    address, _, bits = text.partition("/")
    if not address:
        return 0, b""
    return int(bits or full_prefix(family)), inet_pton(family, address)

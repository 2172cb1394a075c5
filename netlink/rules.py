"""Rules that choose among routing tables (ip-rule(8)), as plain tuples and back into the kernel's words."""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, NamedTuple

from netlink import wire
from netlink.objects import full_prefix, prefix_text
from netlink.routes import RT_TABLE_COMPAT, RT_TABLE_DEFAULT, RT_TABLE_LOCAL, RT_TABLE_MAIN, RTPROT_KERNEL
from netlink.wire import attribute, attributes, number, text

if TYPE_CHECKING:
    from netlink.rtnl import Rtnetlink

_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34  # <linux/rtnetlink.h>
# <linux/fib_rules.h>
FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP = 1, 2, 3
FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT = 6, 7, 8
ACTIONS = (FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP, FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT)
#: Actions that drop a packet.
DROPS = (FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT)
_INVERT = 2
_NONE = 0xFFFFFFFF
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 4, 6, 10
_FRA_SUPPRESS_IFGROUP, _FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME = 13, 14, 15, 16, 17
_FRA_PAD, _FRA_UID_RANGE, _FRA_PROTOCOL, _FRA_IP_PROTO = 18, 20, 21, 22
_FRA_SPORT_RANGE, _FRA_DPORT_RANGE, _FRA_SPORT_MASK, _FRA_DPORT_MASK = 23, 24, 28, 29
_SAID = {
    *(
        _FRA_DST,
        _FRA_SRC,
        _FRA_IIFNAME,
        _FRA_GOTO,
        _FRA_PRIORITY,
        _FRA_FWMARK,
        _FRA_SUPPRESS_IFGROUP,
        _FRA_PAD,
    ),
    *(_FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME, _FRA_UID_RANGE, _FRA_PROTOCOL),
    *(_FRA_IP_PROTO, _FRA_SPORT_RANGE, _FRA_DPORT_RANGE),
}
# A mask that says no more than its port; kernels that have it tell it with every single port.
_WHOLE_PORT = 0xFFFF
_RULE = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr
_PORTS, _USERS = struct.Struct("=HH"), struct.Struct("=II")


class Rule(NamedTuple):
    """One rule. What is empty, 0 or None is not asked about; ranges are their first and last number.

    A rule whose `priority` is lower is asked first. `rest` says which attributes of the kernel's are not told here.
    """

    family: int
    priority: int
    action: int = FR_ACT_TO_TBL
    table: int = 0
    source: str = ""
    destination: str = ""
    incoming: str = ""
    outgoing: str = ""
    invert: bool = False
    tos: int = 0
    mark: int = 0
    mask: int = 0
    goto: int = 0
    suppress_prefix: int | None = None
    suppress_group: int | None = None
    ip_protocol: int = 0
    source_ports: tuple[int, int] | None = None
    destination_ports: tuple[int, int] | None = None
    users: tuple[int, int] | None = None
    protocol: int = 0
    rest: tuple[int, ...] = ()

    @classmethod
    def decode(cls, body: bytes) -> Rule:
        """From an RTM_NEWRULE or RTM_DELRULE."""
        family, to_bits, from_bits, tos, table, _, _, action, flags = _RULE.unpack_from(body)
        found = attributes(body[_RULE.size :])
        for mask in (_FRA_SPORT_MASK, _FRA_DPORT_MASK):
            if number(found.get(mask)) == _WHOLE_PORT:
                del found[mask]
        return cls(
            family,
            number(found.get(_FRA_PRIORITY)),
            action,
            number(found.get(_FRA_TABLE), table),
            prefix_text(family, found.get(_FRA_SRC), from_bits),
            prefix_text(family, found.get(_FRA_DST), to_bits),
            text(found.get(_FRA_IIFNAME)),
            text(found.get(_FRA_OIFNAME)),
            bool(flags & _INVERT),
            tos,
            number(found.get(_FRA_FWMARK)),
            number(found.get(_FRA_FWMASK)),
            number(found.get(_FRA_GOTO)),
            _or_none(found.get(_FRA_SUPPRESS_PREFIXLEN)),
            _or_none(found.get(_FRA_SUPPRESS_IFGROUP)),
            number(found.get(_FRA_IP_PROTO)),
            _range(_PORTS, found.get(_FRA_SPORT_RANGE)),
            _range(_PORTS, found.get(_FRA_DPORT_RANGE)),
            _range(_USERS, found.get(_FRA_UID_RANGE)),
            number(found.get(_FRA_PROTOCOL)),
            tuple(sorted(set(found) - _SAID)),
        )

    def encode(self) -> bytes:
        """For RTM_NEWRULE and RTM_DELRULE. Raises ValueError, OSError for addresses that are none."""
        words = attribute(_FRA_PRIORITY, self.priority) + attribute(_FRA_TABLE, self.table)
        bits = {}
        for kind, prefix in ((_FRA_SRC, self.source), (_FRA_DST, self.destination)):
            address, _, length = prefix.partition("/")
            bits[kind] = int(length or full_prefix(self.family)) if address else 0
            if address:
                words += attribute(kind, inet_pton(self.family, address))
        for kind, name in ((_FRA_IIFNAME, self.incoming), (_FRA_OIFNAME, self.outgoing)):
            if name:
                words += attribute(kind, name)
        if self.mark or self.mask:
            words += attribute(_FRA_FWMARK, self.mark) + attribute(_FRA_FWMASK, self.mask)
        if self.action == FR_ACT_GOTO:
            words += attribute(_FRA_GOTO, self.goto)
        for kind, value in (
            (_FRA_SUPPRESS_PREFIXLEN, self.suppress_prefix),
            (_FRA_SUPPRESS_IFGROUP, self.suppress_group),
        ):
            if value is not None:
                words += attribute(kind, value)
        for kind, layout, pair in (
            (_FRA_SPORT_RANGE, _PORTS, self.source_ports),
            (_FRA_DPORT_RANGE, _PORTS, self.destination_ports),
            (_FRA_UID_RANGE, _USERS, self.users),
        ):
            if pair is not None:
                words += attribute(kind, layout.pack(*pair))
        if self.ip_protocol:
            words += attribute(_FRA_IP_PROTO, bytes([self.ip_protocol]))
        if self.protocol:
            words += attribute(_FRA_PROTOCOL, bytes([self.protocol]))
        table = self.table if self.table < 256 else RT_TABLE_COMPAT
        flags = _INVERT if self.invert else 0
        head = (self.family, bits[_FRA_DST], bits[_FRA_SRC], self.tos, table, 0, 0, self.action, flags)
        return _RULE.pack(*head) + words


#: What the kernel itself makes.
DEFAULT = tuple(
    Rule(family, priority, table=table, protocol=RTPROT_KERNEL)
    for family, priority, table in (
        (AF_INET, 0, RT_TABLE_LOCAL),
        (AF_INET, 32766, RT_TABLE_MAIN),
        (AF_INET, 32767, RT_TABLE_DEFAULT),
        (AF_INET6, 0, RT_TABLE_LOCAL),
        (AF_INET6, 32766, RT_TABLE_MAIN),
    )
)


def rules(rtnl: Rtnetlink) -> list[Rule]:
    """All rules of IPv4 and IPv6, in the order in which they are asked. Raises OSError."""
    found = (Rule.decode(body) for body in rtnl.dump(_RTM_GETRULE, bytes(_RULE.size), _RTM_NEWRULE))
    return [rule for rule in found if rule.family in (AF_INET, AF_INET6)]


def add(rtnl: Rtnetlink, rule: Rule) -> None:
    """Add a rule, behind those with the same priority. Raises ValueError; OSError: EEXIST if there is its like."""
    rtnl.order(_RTM_NEWRULE, wire.NLM_F_CREATE | wire.NLM_F_EXCL, rule.encode())


def delete(rtnl: Rtnetlink, rule: Rule) -> None:
    """Remove a rule. Raises ValueError, OSError."""
    rtnl.order(_RTM_DELRULE, 0, rule.encode())


def _or_none(data: bytes | None) -> int | None:
    value = number(data, _NONE)
    return None if value == _NONE else value


def _range(layout: struct.Struct, data: bytes | None) -> tuple[int, int] | None:
    if data is None or len(data) != layout.size:
        return None
    first, last = layout.unpack(data)
    return first, last

"""Messages as literal bytes of a little-endian machine, and what is refused."""

from __future__ import annotations

import struct
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink import objects, routes, wire
from netlink.objects import Address, Link, Neighbour
from netlink.routes import Route, Way
from netlink.rules import Rule

AF_INET, AF_INET6 = 2, 10
LITTLE = pytest.mark.skipif(sys.byteorder != "little", reason="the literal bytes are little-endian")


@LITTLE
def test_a_message() -> None:
    packed = wire.pack(16, 5, 7, b"abcd")
    assert packed == bytes.fromhex("14000000 1000 0500 07000000 00000000") + b"abcd"
    assert list(wire.unpack(packed + packed)) == [wire.Message(16, 5, 7, b"abcd")] * 2


@LITTLE
def test_attributes() -> None:
    assert wire.attribute(3, "lo") == bytes.fromhex("0700 0300") + b"lo\0" + b"\0"
    assert wire.attribute(4, 1500) == bytes.fromhex("0800 0400 dc050000")
    packed = wire.attribute(3, "lo") + wire.attribute(0x8000 | 18, b"\1\2\3\4\5")
    assert wire.attributes(packed) == {3: b"lo\0", 18: b"\1\2\3\4\5"}


@pytest.mark.parametrize(
    "data",
    [b"\0", b"\x0f\0\0\0" + bytes(12), b"\x20\0\0\0" + bytes(12), bytes(16)],
    ids=["short", "too short a length", "too long a length", "no length"],
)
def test_no_message(data: bytes) -> None:
    with pytest.raises(wire.BrokenMessage):
        list(wire.unpack(data))


@pytest.mark.parametrize("data", [b"\3\0\1\0", b"\x09\0\1\0abcd"], ids=["too short", "too long"])
def test_no_attribute(data: bytes) -> None:
    with pytest.raises(wire.BrokenMessage):
        wire.attributes(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (lambda: list(wire.unpack(data)), lambda: wire.attributes(data)):
        try:
            read()
        except wire.BrokenMessage:
            continue


def test_errors() -> None:
    assert (
        wire.error_of(wire.Message(wire.NLMSG_ERROR, 0, 1, (-17).to_bytes(4, sys.byteorder, signed=True)))
        == 17
    )
    assert wire.error_of(wire.Message(wire.NLMSG_DONE, 0, 1, b"")) == 0
    with pytest.raises(wire.BrokenMessage):
        wire.error_of(wire.Message(wire.NLMSG_ERROR, 0, 1, b"\0"))


@pytest.mark.parametrize(
    "thing",
    [
        Address(3, AF_INET, "10.1.2.3", 24),
        Address(3, AF_INET, "10.1.2.3", 32),
        Address(3, AF_INET6, "fd00::1", 64),
        Neighbour(3, AF_INET, "10.1.2.4", "02:00:00:00:00:01", objects.NUD_PERMANENT, 0),
        Neighbour(3, AF_INET6, "fd00::2", "02:00:00:00:00:01", objects.NUD_PERMANENT, 0x80),
        Address(3, AF_INET, "10.1.2.3", 24, broadcast="10.1.2.9", label="a0:web", scope=253, metric=9),
        Address(3, AF_INET6, "fd00::1", 128, peer="fd00::2", flags=objects.IFA_F_NOPREFIXROUTE),
        Route(AF_INET, "", (Way(3, "10.1.2.1"),)),
        Route(AF_INET, "10.9.0.0/16", (Way(3, "", 4),), "10.1.2.3", 253, 3, 100, ((2, 1400), (8, 1360))),
        Route(AF_INET6, "fd09::/48", (Way(3, "fd00::1"),), "fd00::3", metric=1024, origin="fd00::/64"),
        Route(AF_INET, "10.9.0.0/16", (Way(3, "10.1.2.1", 4, 7), Way(4), Way(5, "fd00::1", 0, 256))),
        Route(AF_INET, "10.9.0.0/16", (), kind=routes.RTN_PROHIBIT, table=70000, tos=4),
        Rule(AF_INET, 0, table=254, source="10.1.0.0/24", destination="10.2.0.1/32", invert=True, tos=4),
        Rule(AF_INET6, 7, 3, incoming="eth0", outgoing="net1", mark=1, mask=0xFF, protocol=4),
        Rule(AF_INET, 7, 2, goto=9, suppress_prefix=0, suppress_group=0, ip_protocol=6, users=(0, 9)),
        Rule(AF_INET, 7, 8, table=70000, source_ports=(1, 1), destination_ports=(1, 65535)),
    ],
)
def test_what_is_told_is_what_is_read(thing: Address | Neighbour | Route | Rule) -> None:
    assert type(thing).decode(thing.encode()) == thing


@given(st.binary(max_size=200))
@pytest.mark.parametrize("kind", [Address, Neighbour, Route, Rule])
def test_any_message_of_the_kernels_is_read_or_refused(
    kind: type[Address | Neighbour | Route | Rule], data: bytes
) -> None:
    with suppress(wire.BrokenMessage, struct.error):
        kind.decode(data)


def test_a_link_of_an_unknown_kind() -> None:
    info = wire.attribute(1, "netkit")
    words = wire.attribute(3, "eth0") + wire.attribute(1, bytes.fromhex("0a580ad50002"))
    body = (
        objects.IFINFO.pack(0, 1, 7, objects.IFF_UP, 0)
        + words
        + wire.attribute(4, 1450)
        + wire.attribute(18, info)
    )
    assert Link.decode(body) == Link(7, "eth0", "0a:58:0a:d5:00:02", 1450, objects.IFF_UP, "netkit")


@pytest.mark.parametrize("mac", ["", "02:00", "02:00:00:00:00:00:01", "nonsense"])
def test_no_mac_address(mac: str) -> None:
    with pytest.raises(ValueError, match=r"MAC address|non-hexadecimal"):
        objects.mac_bytes(mac)

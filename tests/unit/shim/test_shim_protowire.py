"""The hand-written protobuf against the real one."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from shim import protowire
from shim.api.gen import bootstrap_pb2, types_pb2


@given(st.integers(0, (1 << 63) - 1), st.text(), st.binary())
def test_written_fields_are_read_by_protobuf(seconds: int, text: str, data: bytes) -> None:
    assert Timestamp.FromString(protowire.int_field(1, seconds)).seconds == seconds
    message = Any.FromString(protowire.bytes_field(1, text) + protowire.bytes_field(2, data))
    assert (message.type_url, message.value) == (text, data)


@given(st.text(), st.text(), st.integers(0, (1 << 31) - 1))
def test_fields_written_by_protobuf_are_read(address: str, protocol: str, version: int) -> None:
    message = bootstrap_pb2.BootstrapResult(version=version, address=address, protocol=protocol)
    read = dict(protowire.fields(message.SerializeToString()))
    assert read.get(1, 0) == version
    assert protowire.text(read.get(2, b"")) == address
    assert protowire.text(read.get(3, b"")) == protocol


def test_order_and_repetition_are_kept() -> None:
    message = types_pb2.Mount(type="bind", options=["ro", "", "nodev"])
    assert list(protowire.fields(message.SerializeToString())) == [
        (1, b"bind"), (4, b"ro"), (4, b""), (4, b"nodev"),
    ]  # fmt: skip


def test_negative_enum_is_its_64_bit_complement() -> None:
    params = bootstrap_pb2.BootstrapParams(log_level=bootstrap_pb2.LOG_LEVEL_DEBUG)
    assert list(protowire.fields(params.SerializeToString())) == [(3, (1 << 64) - 4)]


def test_fixed_widths() -> None:
    data = b"\x09" + (513).to_bytes(8, "little") + b"\x15" + (7).to_bytes(4, "little")
    assert list(protowire.fields(data)) == [(1, 513), (2, 7)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",  # field number 0
        b"\x08",  # no value
        b"\x08\x80",  # half a varint
        b"\x08" + b"\x80" * 10 + b"\x01",  # a varint of more than 64 bits
        b"\x0a\x05four",  # shorter than it says
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # an absurd length
        b"\x09\0\0\0\0\0\0\0",  # seven of eight bytes
        b"\x15\0\0\0",  # three of four
        b"\x0b",  # a group
        b"\x0f",  # wire type 7
    ],
    ids=lambda data: data.hex(),
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(protowire.fields(data))


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused(data: bytes) -> None:
    try:
        found = list(protowire.fields(data))
    except ValueError:
        return
    assert all(number > 0 for number, _ in found)
    assert sum(len(value) for _, value in found if isinstance(value, bytes)) <= len(data)


def test_text() -> None:
    assert protowire.text("ä".encode()) == "ä"
    for bad in (7, b"\xff"):
        with pytest.raises(ValueError, match=r"string|decode"):
            protowire.text(bad)


def test_defaults_are_not_written() -> None:
    assert protowire.int_field(1, 0) == protowire.bytes_field(1, "") == protowire.bytes_field(1, b"") == b""

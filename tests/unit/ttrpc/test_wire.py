"""Cutting bytes into frames, however they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.ttrpc.peer import LIMIT, Frame, frame
from ttrpc import Code, RpcError, wire

# (stream id, type, flags, data), and the same as bytes.
FRAMES = [
    (Frame(1, 1, 0, b""), bytes.fromhex("00000000 00000001 01 00")),
    (Frame(3, 2, 0, b"\x12\x01x"), bytes.fromhex("00000003 00000003 02 00 120178")),
    (Frame(0x01020304, 3, 5, b""), bytes.fromhex("00000000 01020304 03 05")),
    (Frame(0xFFFFFFFF, 0xEE, 0xFF, b"\x00" * 300), bytes.fromhex("0000012c ffffffff ee ff") + b"\x00" * 300),
]


class Received:
    """A reader that writes down what it is called with."""

    def __init__(self, buffer_size: int = 1024) -> None:
        self.frames: list[Frame] = []
        self.oversized: list[tuple[int, int, int]] = []
        self.reader = wire.FrameReader(
            lambda stream_id, kind, flags, data: self.frames.append(
                Frame(stream_id, kind, flags, bytes(data))
            ),
            lambda *parts: self.oversized.append(parts),
            buffer_size=buffer_size,
        )

    def feed(self, data: bytes, most: int | None = None) -> None:
        """As a socket would: never more than the reader has room for, nor than `most` bytes at a time."""
        while data:
            room = self.reader.buffer()
            count = min(len(room), len(data), most or len(data))
            assert count > 0
            room[:count] = data[:count]
            self.reader.received(count)
            data = data[count:]


@pytest.mark.parametrize(("parts", "data"), FRAMES)
def test_a_frame_is_written_as_the_specification_says(parts: Frame, data: bytes) -> None:
    assert wire.frame(*parts) == data


@pytest.mark.parametrize(("parts", "data"), FRAMES)
@pytest.mark.parametrize("most", [1, 3, 10, 11, None])
def test_a_frame_is_read_however_it_is_torn(parts: Frame, data: bytes, most: int | None) -> None:
    received = Received()
    received.feed(data, most)
    assert received.frames == [parts]


def test_many_frames_in_one_read() -> None:
    received = Received(buffer_size=64 * 1024)
    received.feed(b"".join(data for _, data in FRAMES) * 20)
    assert received.frames == [parts for parts, _ in FRAMES] * 20


@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT])
def test_the_largest_frames_go_both_ways(length: int) -> None:
    data = wire.frame(7, 2, 0, bytes(length))
    received = Received()
    received.feed(data + FRAMES[1][1])
    assert [len(parts.data) for parts in received.frames] == [length, 3]
    assert received.oversized == []


def test_writing_more_than_the_limit_is_refused() -> None:
    with pytest.raises(
        RpcError, match="message of 4194305 bytes is over the limit of 4194304 bytes"
    ) as caught:
        wire.frame(1, 1, 0, bytes(LIMIT + 1))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("most", [1000, None])
def test_an_oversized_frame_is_reported_at_its_header_and_skipped(most: int | None) -> None:
    received = Received(buffer_size=4096)
    header = frame(9, 1, 0, b"", length=LIMIT + 1)
    received.feed(header)
    assert received.oversized == [(9, 1, LIMIT + 1)]
    received.feed(bytes(LIMIT + 1) + FRAMES[1][1], most)
    assert received.oversized == [(9, 1, LIMIT + 1)]
    assert received.frames == [FRAMES[1][0]]


def test_the_longest_length_is_skipped_without_holding_it() -> None:
    received = Received(buffer_size=4096)
    received.feed(frame(9, 1, 0, b"", length=0xFFFFFFFF))
    for _ in range(64):
        received.feed(bytes(65536))
        assert len(received.reader.buffer()) == 4096  # the same buffer, all of it free again
    assert received.frames == []


def test_nothing_is_handed_out_while_paused() -> None:
    received = Received()
    received.reader.pause()
    received.feed(FRAMES[0][1] + FRAMES[1][1])
    assert received.frames == []
    received.reader.resume()
    assert received.frames == [FRAMES[0][0], FRAMES[1][0]]


def test_pausing_in_the_middle_of_a_read_keeps_the_rest() -> None:
    frames: list[int] = []

    def on_frame(stream_id: int, kind: int, flags: int, data: bytearray) -> None:
        frames.append(stream_id)
        reader.pause()

    reader = wire.FrameReader(on_frame, lambda *_: None)
    data = b"".join(frame(stream_id, 2, 0, b"abc") for stream_id in (1, 3, 5))
    reader.buffer()[: len(data)] = data
    reader.received(len(data))
    assert frames == [1]
    reader.resume()
    assert frames == [1, 3]


@given(
    st.lists(
        st.builds(
            Frame,
            st.integers(0, 0xFFFFFFFF),
            st.integers(0, 255),
            st.integers(0, 255),
            st.binary(max_size=300) | st.integers(0, 3000).map(bytes),
        ),
        max_size=12,
    ),
    st.data(),
)
def test_any_frames_in_any_chunks(frames: list[Frame], chunks: st.DataObject) -> None:
    received = Received(buffer_size=chunks.draw(st.integers(1, 2000)))
    data = b"".join(frame(*parts) for parts in frames)
    while data:
        count = chunks.draw(st.integers(1, len(data)))
        received.feed(data[:count])
        data = data[count:]
    assert received.frames == frames


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_give_the_same_frames_in_any_chunks(data: bytes, most: int) -> None:
    whole, torn = Received(buffer_size=64), Received(buffer_size=64)
    whole.feed(data)
    torn.feed(data, most)
    assert (whole.frames, whole.oversized) == (torn.frames, torn.oversized)

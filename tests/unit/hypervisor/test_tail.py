"""Keeping the last lines of a text that an untrusted writer produces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.tail import LINE_BYTES, TAIL_LINES, LineTail


def test_lines_arrive_in_pieces() -> None:
    tail = LineTail()
    assert tail.feed(b"one\ntw") == ["one"]
    assert tail.lines() == ["one", "tw"]
    assert tail.feed(b"o\n\nthree\nfour") == ["two", "three"]
    assert tail.lines() == ["one", "two", "three", "four"]


def test_only_the_last_lines_are_kept() -> None:
    tail = LineTail()
    tail.feed(b"".join(b"%d\n" % n for n in range(1000)))
    assert tail.lines() == [str(n) for n in range(1000 - TAIL_LINES, 1000)]


def test_a_line_without_end_does_not_grow() -> None:
    tail = LineTail()
    for _ in range(100):
        tail.feed(b"x" * 4096)
    assert tail.lines() == ["x" * LINE_BYTES]
    assert tail.feed(b"y\nnext\n") == ["x" * LINE_BYTES, "next"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1bc\x1b[?7l\x1b[2JSeaBIOS (version 1.16)", "SeaBIOS (version 1.16)"),
        (b"red \x1b[31mtext\x1b[0m\r", "red text"),
        (b"a\tb", "a b"),
        (b"bell\x07 nul\x00", "bell� nul�"),
        (b"\xff\xfe", "��"),
        ("grün".encode(), "grün"),
        (b"right-to-left \xe2\x80\xae", "right-to-left �"),
    ],
)
def test_lines_are_printable(raw: bytes, shown: str) -> None:
    assert LineTail().feed(raw + b"\n") == [shown]


@given(st.lists(st.binary(max_size=300)))
def test_any_bytes_are_bounded_and_printable(pieces: list[bytes]) -> None:
    tail = LineTail(max_lines=3, line_bytes=20)
    for piece in pieces:
        tail.feed(piece)
    lines = tail.lines()
    assert len(lines) <= 4
    assert all(line.isprintable() and len(line) <= 20 for line in lines)

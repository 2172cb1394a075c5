from __future__ import annotations

import sys
from pathlib import Path

import pytest

from guest_image import ImageError
from guest_image.elf import Elf
from tests.unit.guest_image import elves


def test_what_a_library_needs() -> None:
    elf = Elf(elves.library(["libm.so.6", "libc.so.6"], ["libc.so.6"]), "x")
    assert elf.needed() == ["libm.so.6", "libc.so.6"]
    assert elf.versioned_libraries() == {"libc.so.6"}
    assert elf.interpreter() is None


def test_the_loader_a_program_asks_for() -> None:
    elf = Elf(elves.library(["libc.so.6"], ["libc.so.6"], interpreter="/lib64/ld.so.2"), "x")
    assert elf.interpreter() == "/lib64/ld.so.2"


def test_a_real_program() -> None:
    program = Path(sys.executable).resolve()
    elf = Elf(program.read_bytes(), program.name)
    assert "libc.so.6" in elf.needed()
    assert "libc.so.6" in elf.versioned_libraries()
    loader = elf.interpreter()
    assert loader is not None
    assert Path(loader).exists()


@pytest.mark.parametrize("dropped", ["liba.so", "libstdc++.so.6", "libz.so"])
def test_dropping_an_unused_library(dropped: str) -> None:
    needed = ["liba.so", "libstdc++.so.6", "libz.so", "libc.so.6"]
    data = elves.library(needed, ["libc.so.6"])
    without = Elf(Elf(data, "x").without_needed(dropped), "x")
    assert without.needed() == [name for name in needed if name != dropped]
    assert without.versioned_libraries() == {"libc.so.6"}
    assert len(without.data) == len(data)


def test_a_used_library_is_not_dropped() -> None:
    elf = Elf(elves.library(["libc.so.6", "libstdc++.so.6"], ["libc.so.6", "libstdc++.so.6"]), "_message.so")
    with pytest.raises(ImageError, match=r"_message\.so does use libstdc\+\+\.so\.6"):
        elf.without_needed("libstdc++.so.6")


def test_notes() -> None:
    assert Elf(elves.noted(b"Xen", 18), "x").notes() == [("Xen", 18)]
    assert Elf(elves.noted(b"GNU", 3, b"12345"), "x").notes() == [("GNU", 3)]


def test_sections() -> None:
    elf = Elf(elves.module("a,b"), "x")
    assert elf.section(".modinfo") == b"license=GPL\0depends=a,b\0name=x\0"
    assert elf.section(".text") is None


def test_a_section_that_nobody_finds_or_loads() -> None:
    data = elves.module("a,b")
    table = int.from_bytes(data[40:48], "little")
    assert data[table + 64 + 8] == 2  # the second header's flags: is loaded
    without = Elf(data, "x").without_sections(".modinfo", ".BTF")
    assert Elf(without, "x").section(".modinfo") is None
    assert Elf(without, "x").section("xxxxxxxx") == Elf(data, "x").section(".modinfo")
    assert without[table + 64 + 8] == 0
    assert len(without) == len(data)
    assert Elf(data, "x").without_sections(".BTF") == data


@pytest.mark.parametrize(
    "data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01\x01" + bytes(60), b"\x7fELF\x02\x01" + bytes(8)]
)
def test_other_files(data: bytes) -> None:
    with pytest.raises(ImageError, match="hello is not a 64-bit ELF file"):
        Elf(data, "hello")


@pytest.mark.parametrize("length", [70, 120, 250])
def test_cut_files(length: int) -> None:
    elf = Elf(elves.library(["libc.so.6"], ["libc.so.6"])[:length], "cut")
    with pytest.raises((ImageError, ValueError)):
        elf.needed()
        elf.versioned_libraries()

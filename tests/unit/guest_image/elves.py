"""ELF files written byte by byte, for tests that must not depend on what the machine has installed."""

from __future__ import annotations

import struct

EHDR, PHDR, SHDR = 64, 56, 64


def header(segments: int, *, sections_at: int = 0, sections: int = 0, names: int = 0) -> bytes:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    return ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, EHDR, sections_at, 0, EHDR, PHDR, segments, SHDR, sections, names
    )


def segment(kind: int, offset: int, size: int, address: int | None = None) -> bytes:
    where = offset if address is None else address
    return struct.pack("<IIQQQQQQ", kind, 4, offset, where, where, size, size, 8)


def library(needed: list[str], versioned: list[str], *, interpreter: str = "") -> bytes:
    """A shared library with a dynamic section; `versioned` are those of which symbol versions are required."""
    base = 0x1000  # addresses differ from file offsets, as they do in real files
    strings = b"\0"
    names: dict[str, int] = {}
    for name in dict.fromkeys([*needed, *versioned]):
        names[name] = len(strings)
        strings += name.encode() + b"\0"
    start = EHDR + 3 * PHDR
    verneed = b""
    for index, name in enumerate(versioned):
        following = 0 if index == len(versioned) - 1 else 16
        verneed += struct.pack("<HHIII", 1, 0, names[name], 16, following)
    strings_at, verneed_at = start, start + len(strings)
    interp_at = verneed_at + len(verneed)
    interp = interpreter.encode() + b"\0" if interpreter else b""
    dynamic_at = -(-(interp_at + len(interp)) // 8) * 8
    entries = [(1, names[name]) for name in needed]
    entries += [(5, strings_at + base), (0x6FFFFFFE, verneed_at + base), (0x6FFFFFFF, len(versioned)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
    end = dynamic_at + len(dynamic)
    data = header(3) + segment(1, 0, end, base) + segment(2, dynamic_at, len(dynamic), dynamic_at + base)
    data += segment(3, interp_at, len(interp), interp_at + base) if interp else segment(0, 0, 0)
    data += strings + verneed + interp
    return data + bytes(dynamic_at - len(data)) + dynamic


def noted(owner: bytes, kind: int, body: bytes = bytes(8)) -> bytes:
    """An ELF file with one note."""
    name = owner + b"\0"
    note = (
        struct.pack("<III", len(name), len(body), kind)
        + name
        + bytes(-len(name) % 4)
        + body
        + bytes(-len(body) % 4)
    )
    return header(1) + segment(4, EHDR + PHDR, len(note)) + note


def module(depends: str | None) -> bytes:
    """A kernel module with nothing but the section in which it describes itself."""
    info = b"license=GPL\0" + (f"depends={depends}\0".encode() if depends is not None else b"") + b"name=x\0"
    names = b"\0.modinfo\0.shstrtab\0"
    info_at = EHDR
    names_at = info_at + len(info)
    table_at = names_at + len(names)

    def section(name: int, offset: int, size: int, flags: int = 0) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, flags, 0, offset, size, 0, 0, 1, 0)

    table = section(0, 0, 0) + section(1, info_at, len(info), flags=2) + section(10, names_at, len(names))
    return header(0, sections_at=table_at, sections=3, names=2) + info + names + table

"""A disk with two partitions, as Kata's guests have it: the root file system, and the hashes it is checked with.

The partition table is the old one of PCs (MBR), a single sector, which every kernel reads. There are two of them,
because the image has two beginnings. As a disk it begins with the first. As persistent memory it begins where a header
(that of the kernel's "fsdax" mode) says, and only with such a header can files be mapped directly; the second table is
there.

     0      4 KiB                2 MiB       4 MiB
     | table | header | nothing  | table ... | partitions ...
Format of the header: struct nd_pfn_sb of drivers/nvdimm/pfn.h of the kernel.
"""

from __future__ import annotations

import struct

_SECTOR_BYTES = 512
_PAGE_BYTES = 4096
ALIGNMENT_BYTES = 2 * 2**20
"""Of partitions and of the whole disk. As persistent memory it is mapped in pages as large as this."""
FIRST_PARTITION_BYTES = 2 * ALIGNMENT_BYTES
_LINUX = 0x83
_MAX_SECTORS = 0xFFFFFFFF
#: No cylinders, heads and sectors: the kernel takes the numbers of sectors, which follow.
_NO_GEOMETRY = b"\xfe\xff\xff"
_HEADER_OFFSET = 4096
_HEADER_SIGNATURE = b"NVDIMM_PFN_INFO\0"
_HEADER_VERSION = (1, 2)
#: The kernel keeps what it knows of the pages in ordinary memory: the image is read-only.
_MODE_RAM = 1


def disk(partitions: list[bytes]) -> bytes:
    """The image of a disk with one to four partitions, each filled up with zeros."""
    content = bytearray(FIRST_PARTITION_BYTES)
    places = []
    for data in partitions:
        filled = data + bytes(-len(data) % ALIGNMENT_BYTES)
        places.append((len(content), len(filled)))
        content += filled
    for begin in (0, ALIGNMENT_BYTES):
        content[begin : begin + _SECTOR_BYTES] = _table(places, begin)
    content[_HEADER_OFFSET : _HEADER_OFFSET + _PAGE_BYTES] = _header(len(content))
    return bytes(content)


def _table(places: list[tuple[int, int]], begin: int) -> bytes:
    """The sector for somebody to whom the disk begins at `begin`; places are offset and size in bytes."""
    entries = b""
    for offset, size in places:
        first, count = (offset - begin) // _SECTOR_BYTES, size // _SECTOR_BYTES
        assert first + count <= _MAX_SECTORS
        entries += struct.pack("<B3sB3sII", 0, _NO_GEOMETRY, _LINUX, _NO_GEOMETRY, first, count)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def _header(size: int) -> bytes:
    """One page that says where the persistent memory's data begins."""
    pages = (size - ALIGNMENT_BYTES) // _PAGE_BYTES
    fields = struct.pack(
        "<16s16s16sIHHQQIIII",
        _HEADER_SIGNATURE, b"kata-py image", b"", 0, *_HEADER_VERSION, ALIGNMENT_BYTES, pages,
        _MODE_RAM, 0, 0, ALIGNMENT_BYTES,
    )  # fmt: skip
    header = fields.ljust(_PAGE_BYTES - 8, b"\0")
    low = high = 0
    for (word,) in struct.iter_unpack("<I", header):  # Fletcher's sum, of which the sum itself is zero
        low = (low + word) & 0xFFFFFFFF
        high += low
    high += 2 * low
    return header + struct.pack("<II", low, high & 0xFFFFFFFF)

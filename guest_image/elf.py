"""The little of ELF that an image builder has to know: which libraries a file needs, its notes, its sections.

Only what our three architectures use: 64-bit files, little endian (x86-64, AArch64) and big endian (s390x).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from guest_image.errors import ImageError

PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_INTERP = 1, 2, 4, 3
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
SHF_ALLOC = 2
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
#: From Xen's interface headers: the 32-bit entry point of a kernel that a VMM may start directly.
XEN_ELFNOTE_PHYS32_ENTRY = 18


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


class Elf:
    """A 64-bit ELF file in memory. Raises ImageError, naming `name`, when it is not one."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.data = data
        if data[:5] != b"\x7fELF\x02" or len(data) < 64:
            raise ImageError(f"{name} is not a 64-bit ELF file")
        self._order = "<" if data[5] == 1 else ">"

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self._order + layout, self.data, offset)
        except struct.error as err:
            raise ImageError(f"{self.name} is a damaged ELF file: nothing at offset {offset}") from err

    @cached_property
    def _segments(self) -> list[_Segment]:
        (table,) = self._unpack("Q", 32)
        entry_size, count = self._unpack("HH", 54)
        found = []
        for index in range(count):
            kind, _flags, offset, address, _physical, size = self._unpack(
                "IIQQQQ", table + index * entry_size
            )
            found.append(_Segment(kind, offset, address, size))
        return found

    def _file_offset(self, address: int) -> int:
        for segment in self._segments:
            if segment.kind == PT_LOAD and segment.address <= address < segment.address + segment.size:
                return segment.offset + address - segment.address
        raise ImageError(f"{self.name} is a damaged ELF file: address {address:#x} is in no segment")

    @cached_property
    def _dynamic(self) -> list[tuple[int, int, int]]:
        """(tag, value, file offset of the entry) of the dynamic section, empty for a static file."""
        entries = []
        for segment in self._segments:
            if segment.kind == PT_DYNAMIC:
                for offset in range(segment.offset, segment.offset + segment.size, 16):
                    tag, value = self._unpack("QQ", offset)
                    if tag == DT_NULL:
                        break
                    entries.append((tag, value, offset))
        return entries

    def _dynamic_value(self, wanted: int) -> int | None:
        return next((value for tag, value, _ in self._dynamic if tag == wanted), None)

    def _string(self, index: int) -> str:
        table = self._dynamic_value(DT_STRTAB)
        if table is None:
            raise ImageError(f"{self.name} is a damaged ELF file: it has no string table")
        start = self._file_offset(table) + index
        return self.data[start : self.data.index(b"\0", start)].decode()

    def needed(self) -> list[str]:
        """Names of the shared libraries the dynamic loader will look for, in the file's order."""
        return [self._string(value) for tag, value, _ in self._dynamic if tag == DT_NEEDED]

    def interpreter(self) -> str | None:
        """Path of the dynamic loader a program asks for."""
        for segment in self._segments:
            if segment.kind == PT_INTERP:
                return self.data[segment.offset : segment.offset + segment.size].rstrip(b"\0").decode()
        return None

    def versioned_libraries(self) -> set[str]:
        """Libraries of which at least one symbol version is required."""
        address, count = self._dynamic_value(DT_VERNEED), self._dynamic_value(DT_VERNEEDNUM)
        if address is None or count is None:
            return set()
        names, offset = set(), self._file_offset(address)
        for _ in range(count):
            _version, _count, name, _aux, following = self._unpack("HHIII", offset)
            names.add(self._string(name))
            offset += following
        return names

    def without_needed(self, library: str) -> bytes:
        """The file's bytes with the dependency on `library` taken out.

        Only for a library that the file was linked with but takes nothing from: nothing proves that for a
        library without symbol versions, so one that has them is required, and must not be used.
        """
        if library in self.versioned_libraries():
            raise ImageError(f"{self.name} does use {library}: the dependency cannot be dropped")
        entries = [(tag, value, offset) for tag, value, offset in self._dynamic]
        kept = [
            (tag, value)
            for tag, value, _ in entries
            if not (tag == DT_NEEDED and self._string(value) == library)
        ]
        data = bytearray(self.data)
        for index, (_tag, _value, offset) in enumerate(entries):
            tag, value = kept[index] if index < len(kept) else (DT_NULL, 0)
            struct.pack_into(self._order + "QQ", data, offset, tag, value)
        return bytes(data)

    def notes(self) -> list[tuple[str, int]]:
        """(owner, type) of every note, for example ("Xen", 18) on a kernel that can be started by PVH."""
        found = []
        for segment in self._segments:
            if segment.kind != PT_NOTE:
                continue
            offset, end = segment.offset, segment.offset + segment.size
            while offset + 12 <= end:
                name_size, body_size, kind = self._unpack("III", offset)
                owner = (
                    self.data[offset + 12 : offset + 12 + name_size].rstrip(b"\0").decode(errors="replace")
                )
                found.append((owner, kind))
                offset += 12 + -(-name_size // 4) * 4 + -(-body_size // 4) * 4
        return found

    def section(self, wanted: str) -> bytes | None:
        """Contents of a section by name; kernel modules describe themselves in `.modinfo`."""
        for name_at, offset, size in self._sections():
            if self._text(name_at) == wanted:
                return self.data[offset : offset + size]
        return None

    def without_sections(self, *names: str) -> bytes:
        """The file's bytes with sections that a loader neither finds by their names nor loads. One that the file does
        not have is no error."""
        data = bytearray(self.data)
        (table,) = self._unpack("Q", 40)
        (entry_size,) = self._unpack("H", 58)
        for index, (name_at, _, _) in enumerate(self._sections()):
            name = self._text(name_at)
            if name in names:
                data[name_at : name_at + len(name)] = b"x" * len(name)
                at = table + index * entry_size + 8
                (flags,) = self._unpack("Q", at)
                struct.pack_into(f"{self._order}Q", data, at, flags & ~SHF_ALLOC)
        return bytes(data)

    def _text(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def _sections(self) -> list[tuple[int, int, int]]:
        """(file offset of the name, file offset of the contents, their size) of every section."""
        (table,) = self._unpack("Q", 40)
        entry_size, count, names_index = self._unpack("HHH", 58)
        headers = [self._unpack("IIQQQQ", table + index * entry_size) for index in range(count)]
        if names_index >= len(headers):
            return []
        names_at = headers[names_index][4]
        return [(names_at + name, offset, size) for name, _kind, _flags, _address, offset, size in headers]

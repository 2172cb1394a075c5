"""From the distribution's kernel package to the ELF file that QEMU starts directly, and to its modules.

Debian ships a bzImage: setup code, then a compressed ELF kernel. Started as plain ELF through its PVH entry
the kernel neither decompresses itself nor passes through real mode, which under emulation costs 0.7 s.
"""

from __future__ import annotations

import lzma
import re
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_image.elf import XEN_ELFNOTE_PHYS32_ENTRY, Elf
from guest_image.errors import ImageError
from guest_image.tools import run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from guest_image.tools import Root

#: First bytes of the payload, and the program that unpacks it. Offsets are those of the x86 boot protocol.
_UNPACKERS = {
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x1f\x8b": "gzip",
}
_HEADER_MAGIC = b"HdrS"
#: How a signed module ends: signature, twelve bytes about it (the last four its size), this line.
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_INFO_BYTES = 12


def vmlinux(bzimage: bytes, name: str, tools: Root) -> bytes:
    """The uncompressed kernel inside an x86 bzImage. A program the machine lacks is taken from `tools`.

    Raises ImageError when the file is no bzImage, when nothing can undo its compression, or when the kernel
    cannot be started through PVH.
    """
    if bzimage[0x202:0x206] != _HEADER_MAGIC:
        raise ImageError(f"{name} is not an x86 Linux kernel")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    # The last four bytes are the size of the unpacked kernel, which the compressors' formats do not know.
    kernel = _unpack(payload[:-4], name, tools)
    size = int.from_bytes(payload[-4:], "little")
    if len(kernel) != size:
        raise ImageError(f"{name} unpacks to {len(kernel)} bytes, its header says {size}")
    if ("Xen", XEN_ELFNOTE_PHYS32_ENTRY) not in Elf(kernel, name).notes():
        raise ImageError(f"{name} has no PVH entry (CONFIG_PVH): QEMU cannot start it as an ELF file")
    return kernel


def _unpack(payload: bytes, name: str, tools: Root) -> bytes:
    for magic, program in _UNPACKERS.items():
        if payload.startswith(magic):
            if shutil.which(program) is not None:
                return run([program, "-dc"], data=payload)
            return tools.run(tools.find(f"usr/bin/{program}", f"bin/{program}"), "-dc", data=payload)
    raise ImageError(f"{name} is compressed in an unknown way ({payload[:4].hex()})")


@dataclass(frozen=True)
class Module:
    """A kernel module: its name as the kernel spells it, the modules it needs first, and its ELF bytes."""

    name: str
    needs: tuple[str, ...]
    data: bytes


class ModuleDirectory:
    """`/lib/modules/<release>` of an unpacked kernel package."""

    def __init__(self, directory: Path) -> None:
        self.release = directory.name
        self._files = {_plain_name(path.name): path for path in directory.glob("kernel/**/*.ko*")}
        builtin = (directory / "modules.builtin").read_text().splitlines()
        self.builtin = frozenset(_plain_name(line.rsplit("/", 1)[-1]) for line in builtin)

    def has_file(self, name: str) -> bool:
        """Whether there is such a module, and not built in."""
        return name in self._files

    def load(self, name: str) -> Module:
        """Read one module. Raises ImageError when the kernel neither has it as a file nor built in."""
        path = self._files.get(name)
        if path is None:
            raise ImageError(f"kernel {self.release} has no module {name}")
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix != ".ko":
            raise ImageError(f"module {path.name} is compressed in a way that the guest cannot load")
        info = Elf(data, path.name).section(".modinfo") or b""
        data = _quick_to_load(data, path.name)
        needs = re.search(rb"(?:^|\0)depends=([^\0]*)", info)
        names = [word.replace("-", "_") for word in needs[1].decode().split(",") if word] if needs else []
        return Module(name, tuple(names), data)

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The modules and what they need, each after its needs. Names that are built in are left out."""
        ordered: dict[str, Module] = {}

        def visit(name: str) -> None:
            if name in ordered or name in self.builtin:
                return
            module = self.load(name)
            for needed in module.needs:
                visit(needed)
            ordered[name] = module

        for name in names:
            visit(name)
        return list(ordered.values())


def _quick_to_load(data: bytes, name: str) -> bytes:
    """A module without its signature, type information (BTF) and unwinding tables (ORC), which loads in half the time.

    The signature would say that the distribution made the module; the initrd, which the host vouches for as a whole,
    says so already, and the kernel does not insist (it marks itself as tainted). Nobody traces the guest's kernel with
    BPF programs that would need the types. The tables, which are sorted at each load and have half of the relocations,
    are for traces of a kernel that stops: functions of modules are then told with a question mark.
    """
    if data.endswith(_SIGNATURE_MAGIC):
        end = len(data) - len(_SIGNATURE_MAGIC)
        signature_bytes = int.from_bytes(data[end - 4 : end], "big")
        data = data[: end - _SIGNATURE_INFO_BYTES - signature_bytes]
    return Elf(data, name).without_sections(".BTF", ".orc_unwind", ".orc_unwind_ip")


def _plain_name(file_name: str) -> str:
    return file_name.split(".ko", 1)[0].replace("-", "_")

"""Programs for the kernel's BPF machine: their instructions, and the calls that load and attach them.

What a program decides is its module's: who may open a device, `oci_engine.cgroups.device_program`.
"""

from __future__ import annotations

import os
import struct

from oci_engine import linux
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Operation codes, linux/bpf.h and linux/bpf_common.h. Where two are alike, the one without a width is of 32 bits.
LOAD_WORD, LOAD_HALF = 0x61, 0x69  # dst = *(u32 *)(src + off), or *(u16 *)
STORE_WORD = 0x62  # *(u32 *)(dst + off) = number
AND, SHIFT_RIGHT, MOVE_NUMBER, MOVE = 0x54, 0x74, 0xB4, 0xBC
MOVE_64, ADD_64, TO_BIG_ENDIAN = 0xBF, 0x07, 0xDC
IF_NOT_EQUAL, IF_ANY_BIT, IF_EQUAL_64, IF_LESS_64, JUMP = 0x56, 0x46, 0x15, 0xA5, 0x05
CALL, EXIT = 0x85, 0x95
_LOAD_TWO_WORDS, _PSEUDO_MAP = 0x18, 1
#: Where a function's result, its first arguments and the program's context are, what survives a call, and the stack.
RESULT, ARGUMENT, KEPT, STACK = 0, 1, 6, 10

_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_LOG_SIZE = 1 << 16
_LITTLE = struct.pack("=H", 1) == b"\1\0"


class Refused(OSError):
    """The kernel does not take a program; `strerror` has its words."""


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> bytes:
    """One of them, as the kernel has it in memory."""
    return struct.pack("=BBhi", code, _registers(to, source), offset, number)


def load_map(to: int, map_fd: int) -> list[bytes]:
    """Instructions, two, that bring a map into a register."""
    return [instruction(_LOAD_TWO_WORDS, to, _PSEUDO_MAP, number=map_fd), instruction(0)]


def answer(number: int) -> list[bytes]:
    """Instructions, two, that end the program."""
    return [instruction(MOVE_NUMBER, RESULT, number=number), instruction(EXIT)]


def signed(number: int) -> int:
    """As the 32 bits of an instruction have it."""
    return number - (1 << 32) if number >= 1 << 31 else number


def _registers(to: int, source: int) -> int:
    """Two bit fields of four: which comes first depends on the byte order."""
    return to | source << 4 if _LITTLE else to << 4 | source


def load(program: bytes, kind: int, attached_to: int, name: bytes) -> int:
    """Have the kernel verify it; returns an open file that stands for it. Raises Refused."""
    try:
        return _load(program, kind, attached_to, name, None)
    except OSError as err:
        number, reason = err.errno, err.strerror
    # Once more for its words: a log that is too small for a long program would be an error by itself.
    log = linux.buffer(bytes(_LOG_SIZE))
    with suppress(OSError):
        os.close(_load(program, kind, attached_to, name, log))
    said = bytes(log).partition(b"\0")[0].decode(errors="replace").strip().rpartition("\n")[2]
    raise Refused(number, f"the kernel refuses the program: {reason} {said}".rstrip())


def _load(program: bytes, kind: int, attached_to: int, name: bytes, log: Any) -> int:
    memory, licence = linux.buffer(program), linux.buffer(b"Apache-2.0\0")
    level, size, place = (1, _LOG_SIZE, linux.address(log)) if log is not None else (0, 0, 0)
    attributes = struct.pack(
        "=IIQQIIQII16sII", kind, len(program) // 8, linux.address(memory), linux.address(licence),
        level, size, place, 0, 0, name, 0, attached_to,
    )  # fmt: skip
    return linux.bpf(_PROG_LOAD, attributes)


def new_map(kind: int, entries: int) -> int:
    """An open map from 32 bits to 32 bits. Raises OSError."""
    return linux.bpf(_MAP_CREATE, struct.pack("=IIIII", kind, 4, 4, entries, 0))


def set_entry(map_fd: int, key: int, value: int) -> None:
    """Raises OSError."""
    key_memory, value_memory = linux.buffer(struct.pack("=I", key)), linux.buffer(struct.pack("=I", value))
    pointers = linux.address(key_memory), linux.address(value_memory)
    linux.bpf(_MAP_UPDATE, struct.pack("=IIQQQ", map_fd, 0, *pointers, 0))


def link(program: int, target: int, kind: int) -> int:
    """Attach a program for as long as the descriptor that is returned is open. Raises OSError."""
    return linux.bpf(_LINK_CREATE, struct.pack("=IIII", program, target, kind, 0))

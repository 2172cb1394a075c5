"""Rules about devices as a program for the kernel's BPF machine, which version 2 of control groups asks.

The program gets what is asked for: kind of device, kinds of access, numbers. It goes through the rules from the last
to the first and keeps the kinds of access that no rule has decided yet. A rule that allows takes its own away, and
when none is left the answer is yes; a rule that denies one of them ends it with no.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from oci_engine import linux
from oci_engine.errors import SetupFailed

if TYPE_CHECKING:
    from oci_engine.resources_spec import DeviceRule

# Operation codes, linux/bpf.h and linux/bpf_common.h
_LOAD_WORD = 0x61  # dst = *(u32 *)(src + off)
_AND, _SHIFT_RIGHT, _MOVE_NUMBER, _MOVE = 0x54, 0x74, 0xB4, 0xBC
_IF_NOT_EQUAL, _IF_ANY_BIT, _JUMP = 0x56, 0x46, 0x05
_EXIT = 0x95
_ANSWER, _CONTEXT, _KIND, _ACCESS, _MAJOR, _MINOR = range(6)

_KINDS = {"b": 1, "c": 2}
_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_TYPE_CGROUP_DEVICE = 15
_ATTACH_DEVICE = 6
_ALLOW_MULTI = 2
_LOG_SIZE = 1 << 16
_MOST_PROGRAMS = 64


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> bytes:
    return struct.pack("=BBhi", code, _registers(to, source), offset, number)


_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _registers(to: int, source: int) -> int:
    """Two bit fields of four: which comes first depends on the byte order."""
    return to | source << 4 if _LITTLE else to << 4 | source


def _answer(number: int) -> list[bytes]:
    return [_instruction(_MOVE_NUMBER, _ANSWER, number=number), _instruction(_EXIT)]


def assemble(rules: tuple[DeviceRule, ...]) -> bytes:
    """The program."""
    code = [
        _instruction(_LOAD_WORD, _KIND, _CONTEXT, 0),
        _instruction(_MOVE, _ACCESS, _KIND),
        _instruction(_AND, _KIND, number=0xFFFF),
        _instruction(_SHIFT_RIGHT, _ACCESS, number=16),
        _instruction(_LOAD_WORD, _MAJOR, _CONTEXT, 4),
        _instruction(_LOAD_WORD, _MINOR, _CONTEXT, 8),
    ]
    for rule in reversed(rules):
        code += _rule(rule)
    return b"".join([*code, *_answer(0)])


def _rule(rule: DeviceRule) -> list[bytes]:
    bits = sum(_ACCESS_BITS[letter] for letter in set(rule.access))
    if rule.allow:
        decided = _answer(1)
        body = [
            _instruction(_AND, _ACCESS, number=~bits & 0x7),
            _instruction(_IF_NOT_EQUAL, _ACCESS, offset=len(decided), number=0),
            *decided,
        ]
    else:
        decided = _answer(0)
        # Jumps into the answer, or over it.
        body = [
            _instruction(_IF_ANY_BIT, _ACCESS, offset=1, number=bits),
            _instruction(_JUMP, offset=len(decided)),
            *decided,
        ]
    conditions = []
    if rule.type != "a":
        conditions.append((_KIND, _KINDS[rule.type]))
    if rule.major is not None:
        conditions.append((_MAJOR, rule.major))
    if rule.minor is not None:
        conditions.append((_MINOR, rule.minor))
    checks = [
        _instruction(
            _IF_NOT_EQUAL, register, offset=len(conditions) - index - 1 + len(body), number=_signed(wanted)
        )
        for index, (register, wanted) in enumerate(conditions)
    ]
    return [*checks, *body]


def _signed(number: int) -> int:
    """As the 32 bits of an instruction have it."""
    return number - (1 << 32) if number >= 1 << 31 else number


def load(program: bytes) -> int:
    """Have the kernel verify it; returns an open file that stands for it. Raises SetupFailed."""
    try:
        return _load(program, None)
    except OSError as err:
        reason = err.strerror
    # Once more for its words: a log that is too small for a long program would be an error by itself.
    log = linux.buffer(bytes(_LOG_SIZE))
    with suppress(OSError):
        os.close(_load(program, log))
    said = bytes(log).partition(b"\0")[0].decode(errors="replace").strip().rpartition("\n")[2]
    raise SetupFailed(f"linux.resources.devices: the kernel refuses the program: {reason} {said}")


def _load(program: bytes, log: Any) -> int:
    memory, licence = linux.buffer(program), linux.buffer(b"Apache-2.0\0")
    level, size, place = (1, _LOG_SIZE, linux.address(log)) if log is not None else (0, 0, 0)
    attributes = struct.pack(
        "=IIQQIIQII16sII", _TYPE_CGROUP_DEVICE, len(program) // 8, linux.address(memory), linux.address(licence),
        level, size, place, 0, 0, b"devices", 0, _ATTACH_DEVICE,
    )  # fmt: skip
    return linux.bpf(_PROG_LOAD, attributes)


def attach(group: str, program: int) -> None:
    """Have it asked for the processes of a group, in place of those that were attached there before."""
    folder = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        before = attached(folder)
        linux.bpf(_PROG_ATTACH, struct.pack("=IIIII", folder, program, _ATTACH_DEVICE, _ALLOW_MULTI, 0))
        for number in before:
            _detach(folder, number)
    except OSError as err:
        raise SetupFailed(f"linux.resources.devices: attaching the program: {err.strerror}") from None
    finally:
        os.close(folder)


def _detach(folder: int, number: int) -> None:
    try:
        old = linux.bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
    except OSError as err:
        if err.errno == errno.ENOENT:  # it went with its last user
            return
        raise
    try:
        linux.bpf(_PROG_DETACH, struct.pack("=III", folder, old, _ATTACH_DEVICE))
    finally:
        os.close(old)


def attached(folder: int) -> list[int]:
    """The numbers of the programs of an open group."""
    numbers = linux.buffer(bytes(4 * _MOST_PROGRAMS))
    query = linux.buffer(
        struct.pack("=IIIIQII", folder, _ATTACH_DEVICE, 0, 0, linux.address(numbers), _MOST_PROGRAMS, 0)
    )
    linux.bpf_memory(_PROG_QUERY, query)
    (count,) = struct.unpack_from("=I", bytes(query), 24)
    return list(struct.unpack_from(f"={count}I", bytes(numbers)))

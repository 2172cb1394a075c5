"""Rules about devices as a program for the kernel's BPF machine, which version 2 of control groups asks.

The program gets what is asked for: kind of device, kinds of access, numbers. It goes through the rules from the last
to the first and keeps the kinds of access that no rule has decided yet. A rule that allows takes its own away, and
when none is left the answer is yes; a rule that denies one of them ends it with no.
"""

from __future__ import annotations

import errno
import os
import struct

from oci_engine import bpf, linux
from oci_engine.bpf import answer, instruction, signed
from oci_engine.errors import SetupFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.resources_spec import DeviceRule

# Registers. The first is the answer's, the second the context's.
_CONTEXT, _KIND, _ACCESS, _MAJOR, _MINOR = range(1, 6)

_KINDS = {"b": 1, "c": 2}
_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}

_PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 8, 9, 13, 16
_TYPE_CGROUP_DEVICE = 15
_ATTACH_DEVICE = 6
_ALLOW_MULTI = 2
_MOST_PROGRAMS = 64


def assemble(rules: tuple[DeviceRule, ...]) -> bytes:
    """The program."""
    code = [
        instruction(bpf.LOAD_WORD, _KIND, _CONTEXT, 0),
        instruction(bpf.MOVE, _ACCESS, _KIND),
        instruction(bpf.AND, _KIND, number=0xFFFF),
        instruction(bpf.SHIFT_RIGHT, _ACCESS, number=16),
        instruction(bpf.LOAD_WORD, _MAJOR, _CONTEXT, 4),
        instruction(bpf.LOAD_WORD, _MINOR, _CONTEXT, 8),
    ]
    for rule in reversed(rules):
        code += _rule(rule)
    return b"".join([*code, *answer(0)])


def _rule(rule: DeviceRule) -> list[bytes]:
    bits = sum(_ACCESS_BITS[letter] for letter in set(rule.access))
    if rule.allow:
        decided = answer(1)
        body = [
            instruction(bpf.AND, _ACCESS, number=~bits & 0x7),
            instruction(bpf.IF_NOT_EQUAL, _ACCESS, offset=len(decided), number=0),
            *decided,
        ]
    else:
        decided = answer(0)
        # Jumps into the answer, or over it.
        body = [
            instruction(bpf.IF_ANY_BIT, _ACCESS, offset=1, number=bits),
            instruction(bpf.JUMP, offset=len(decided)),
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
        instruction(
            bpf.IF_NOT_EQUAL, register, offset=len(conditions) - index - 1 + len(body), number=signed(wanted)
        )
        for index, (register, wanted) in enumerate(conditions)
    ]
    return [*checks, *body]


def load(program: bytes) -> int:
    """Have the kernel verify it; returns an open file that stands for it. Raises SetupFailed."""
    try:
        return bpf.load(program, _TYPE_CGROUP_DEVICE, _ATTACH_DEVICE, b"devices")
    except bpf.Refused as err:
        raise SetupFailed(f"linux.resources.devices: {err.strerror}") from None


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

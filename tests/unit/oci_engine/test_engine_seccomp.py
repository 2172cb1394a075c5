"""Filters: from the specification to what libseccomp makes of it."""

from __future__ import annotations

import gc
import os

import pytest

from oci_engine.errors import SetupFailed
from oci_engine.reader import Reader
from oci_engine.seccomp import ACTIONS, ARCHITECTURES, OPERATORS, compile_filter, read_seccomp

ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}


def program(**changes: object) -> bytes:
    return compile_filter(read_seccomp(Reader({**ALLOW, **changes})))


def rule(name: str, action: str = "SCMP_ACT_ERRNO", **more: object) -> dict[str, object]:
    return {"names": [name], "action": action, **more}


def test_rules_make_a_difference() -> None:
    plain = program(syscalls=[rule("mkdirat")])
    assert len(plain) % 8 == 0
    assert plain != program()
    assert plain != program(syscalls=[rule("mkdirat", errnoRet=2)])
    # The same as the default, or about a system call that nobody knows: nothing.
    assert program(syscalls=[rule("mkdirat", "SCMP_ACT_ALLOW"), rule("no_such_call")]) == program()


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action(action: str) -> None:
    default = "SCMP_ACT_ALLOW" if action != "SCMP_ACT_ALLOW" else "SCMP_ACT_LOG"
    assert program(defaultAction=default, syscalls=[rule("mkdirat", action)], listenerPath="/x")


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_every_operator(operator: str) -> None:
    argument = {"index": 1, "value": 2**63, "valueTwo": 3, "op": operator}
    assert program(syscalls=[rule("kill", args=[argument])]) != program(syscalls=[rule("kill")])


def test_conditions_on_one_argument_are_alternatives() -> None:
    args = [{"index": 1, "value": value, "op": "SCMP_CMP_EQ"} for value in (10, 12)]
    both = program(syscalls=[rule("kill", args=args)])
    assert both == program(syscalls=[rule("kill", args=[each]) for each in args])


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="which architectures go together depends on the machine"
)
def test_architectures() -> None:
    assert len(program(architectures=["SCMP_ARCH_X86", "SCMP_ARCH_X32"], syscalls=[rule("mkdir")])) > len(
        program(syscalls=[rule("mkdir")])
    )
    with pytest.raises(SetupFailed, match=r"linux\.seccomp: architecture s390x"):
        program(architectures=["SCMP_ARCH_S390X"])
    assert "SCMP_ARCH_AARCH64" in ARCHITECTURES


@pytest.mark.parametrize(
    ("asks", "flags", "wanted"),
    [
        (True, (), 8), (True, ("TSYNC", "LOG"), 8 | 2), (True, ("WAIT_KILLABLE_RECV", "SPEC_ALLOW"), 8 | 32 | 4),
        (False, ("WAIT_KILLABLE_RECV", "TSYNC"), 1), (False, (), 0),
    ],
)  # fmt: skip
def test_flags(asks: bool, flags: tuple[str, ...], wanted: int) -> None:
    """What the kernel takes together: a listener goes with no other threads, and only a listener keeps one waiting."""
    document = {
        **ALLOW, "listenerPath": "/x", "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in flags],
        "syscalls": [rule("mkdir", "SCMP_ACT_NOTIFY")] if asks else [],
    }  # fmt: skip
    read = read_seccomp(Reader(document))
    assert read.flags == wanted
    assert bool(read.listener_path) == asks


def test_a_filter_leaves_nothing_to_the_garbage_collector() -> None:
    """Of which the guest's agent does without while it starts."""
    program(syscalls=[rule("mkdirat")])
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            program(syscalls=[rule("mkdirat")])
        assert gc.collect() == 0
    finally:
        gc.enable()

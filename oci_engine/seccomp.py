"""System call filters: from the specification to the program that the kernel runs.

The program is made by libseccomp, before the fork; afterwards it is bytes. Names of system calls that this library
does not know cannot be called by that name here either, and are left out, as other runtimes do.
"""

from __future__ import annotations

import errno
import os
import struct

from oci_engine import linux
from oci_engine.errors import SetupFailed, SpecError, Unsupported
from oci_engine.reader import UINT64_MAX
from oci_engine.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_engine.reader import Reader

# seccomp.h of libseccomp
ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000, "SCMP_ACT_KILL_THREAD": 0x00000000, "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000, "SCMP_ACT_ERRNO": 0x00050000, "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_NOTIFY": 0x7FC00000, "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000,
}  # fmt: skip
_NOTIFY = ACTIONS["SCMP_ACT_NOTIFY"]
_WITH_NUMBER = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
OPERATORS = {
    "SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5, "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}  # fmt: skip
FLAGS = {
    f"SECCOMP_FILTER_FLAG_{name}": getattr(linux, f"SECCOMP_FILTER_FLAG_{name}")
    for name in ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV")
}
ARCHITECTURES = {
    f"SCMP_ARCH_{name}": name.lower()
    for name in (
        "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64",
        "MIPSEL64N32", "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64",
        "M68K", "SH", "SHEB",
    )
}  # fmt: skip
_ATTRIBUTE_NNP, _ATTRIBUTE_OPTIMIZE = 3, 8
_BINARY_TREE = 2
_UNKNOWN_SYSCALL = -1


class Argument(Record):
    index: int
    value: int
    value_two: int
    operator: int


class Rule(Record):
    names: tuple[str, ...]
    action: int
    arguments: tuple[Argument, ...]


class Seccomp(Record):
    """Actions are the kernel's words, with the error number in them. `flags` are those to install the filter with.

    `listener_path` is the socket of the program that is asked about system calls; empty where none is notified.
    """

    default_action: int
    architectures: tuple[str, ...]
    flags: int
    rules: tuple[Rule, ...]
    listener_path: str
    listener_metadata: str


def read_seccomp(reader: Reader) -> Seccomp:
    flags = 0
    for index, name in enumerate(reader.texts("flags")):
        if name not in FLAGS:
            raise Unsupported(f"{reader.at('flags')}[{index}]", f"{name!r} is not supported")
        flags |= FLAGS[name]
    architectures = reader.texts("architectures")
    for index, name in enumerate(architectures):
        if name not in ARCHITECTURES:
            raise SpecError(f"{reader.at('architectures')}[{index}]", f"{name!r} is not an architecture")
    default_action = _read_action(reader, "defaultAction", "defaultErrnoRet")
    rules = reader.objects("syscalls", _read_rule)
    notifies = _check_notification(reader, default_action, rules)
    return Seccomp(
        default_action=default_action,
        architectures=tuple(ARCHITECTURES[name] for name in architectures),
        flags=_flags(flags, notifies=notifies),
        rules=rules,
        listener_path=reader.text("listenerPath", "") if notifies else "",
        listener_metadata=reader.text("listenerMetadata", ""),
    )


def _check_notification(reader: Reader, default_action: int, rules: tuple[Rule, ...]) -> bool:
    """Whether a program is asked. The process tells about its listener by `write`, and nobody answers before that."""
    path = reader.text("listenerPath", "")
    if default_action == _NOTIFY:
        raise Unsupported(
            reader.at("defaultAction"), "SCMP_ACT_NOTIFY must not be asked for every system call"
        )
    notified = [index for index, rule in enumerate(rules) if rule.action == _NOTIFY]
    for index in notified:
        if "write" in rules[index].names:
            raise Unsupported(
                f"{reader.at('syscalls')}[{index}].names", "SCMP_ACT_NOTIFY is not possible for write"
            )
    if notified and not path:
        raise SpecError(reader.at("listenerPath"), "is missing, and SCMP_ACT_NOTIFY needs a program to ask")
    if path and not path.startswith("/"):
        raise SpecError(reader.at("listenerPath"), f"want an absolute path, got {path!r}")
    if reader.text("listenerMetadata", "") and not path:
        raise SpecError(reader.at("listenerMetadata"), "is for a listener, and listenerPath is missing")
    return bool(notified)


def _flags(wanted: int, *, notifies: bool) -> int:
    if notifies:
        # The kernel refuses TSYNC beside it, which makes no difference: the process has one thread by then.
        return wanted & ~linux.SECCOMP_FILTER_FLAG_TSYNC | linux.SECCOMP_FILTER_FLAG_NEW_LISTENER
    # Is about waiting for an answer.
    return wanted & ~linux.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV


def _read_action(reader: Reader, name: str, number: str) -> int:
    action = reader.text(name)
    reader.choice(name, ACTIONS)
    value = reader.maybe_integer(number, 0, 0xFFFF)
    if action in _WITH_NUMBER:
        return ACTIONS[action] | (errno.EPERM if value is None else value)
    if value:
        raise SpecError(reader.at(number), f"{action} has no error number")
    return ACTIONS[action]


def _read_rule(reader: Reader) -> Rule:
    names = reader.texts("names")
    if not names:
        raise SpecError(reader.at("names"), "is empty")
    return Rule(
        names=names,
        action=_read_action(reader, "action", "errnoRet"),
        arguments=reader.objects("args", _read_argument),
    )


def _read_argument(reader: Reader) -> Argument:
    return Argument(
        index=reader.integer("index", 0, 5),
        value=reader.integer("value", 0, UINT64_MAX),
        value_two=reader.integer("valueTwo", 0, UINT64_MAX, 0),
        operator=OPERATORS[reader.choice("op", OPERATORS)],
    )


def compile_filter(seccomp: Seccomp) -> bytes:
    """The program, as an array of struct sock_filter. Raises SetupFailed when the library is missing or refuses."""
    library = _Library.loaded()
    context = library.new(seccomp.default_action)
    try:
        for name in seccomp.architectures:
            library.add_architecture(context, name)
        for rule in seccomp.rules:
            if rule.action != seccomp.default_action:
                _add_rule(library, context, rule)
        return library.export(context)
    finally:
        library.release(context)


def _add_rule(library: _Library, context: Any, rule: Rule) -> None:
    indexes = [argument.index for argument in rule.arguments]
    # All conditions together are one rule; several on the same argument are alternatives, each a rule of its own.
    alternatives = (
        [rule.arguments] if len(set(indexes)) == len(indexes) else [(each,) for each in rule.arguments]
    )
    for name in rule.names:
        number = library.number_of(name)
        if number == _UNKNOWN_SYSCALL:
            continue
        for arguments in alternatives:
            library.add_rule(context, rule.action, number, arguments, name)


class _Library:
    """libseccomp, as far as it is needed here."""

    _loaded: _Library | None = None

    @classmethod
    def loaded(cls) -> _Library:
        """One for all filters. A function of a shared library holds itself, so each that was made anew would stay until
        the garbage collector comes: 6 KiB for a filter.
        """
        if cls._loaded is None:
            cls._loaded = cls()
        return cls._loaded

    def __init__(self) -> None:
        try:
            library = linux.Library("libseccomp.so.2")
        except OSError as err:
            raise SetupFailed(f"linux.seccomp: {err}; install libseccomp2") from None
        self._init = library.returns_address("seccomp_init", 1)
        self._release = library.returns_int("seccomp_release", 1)
        self._resolve_architecture = library.returns_unsigned("seccomp_arch_resolve_name", 1)
        self._add_architecture = library.returns_int("seccomp_arch_add", 2)
        self._set_attribute = library.returns_int("seccomp_attr_set", 3)
        self._resolve_name = library.returns_int("seccomp_syscall_resolve_name", 1)
        self._add_rules = library.returns_int("seccomp_rule_add_array", 5)
        self._export = library.returns_int("seccomp_export_bpf", 2)

    def new(self, default_action: int) -> Any:
        context = self._init(default_action)
        if not context:
            raise SetupFailed(f"linux.seccomp: libseccomp refuses the default action {default_action:#x}")
        # The engine itself decides on no_new_privs. A binary tree costs the container less at every call.
        self._set_attribute(context, _ATTRIBUTE_NNP, 0)
        self._set_attribute(context, _ATTRIBUTE_OPTIMIZE, _BINARY_TREE)
        return context

    def add_architecture(self, context: Any, name: str) -> None:
        token = self._resolve_architecture(name.encode() + b"\0")
        if token == 0:
            raise SetupFailed(f"linux.seccomp: this libseccomp does not know the architecture {name}")
        result = self._add_architecture(context, token)
        if result not in (0, -errno.EEXIST):
            raise SetupFailed(f"linux.seccomp: architecture {name}: {os.strerror(-result)}")

    def number_of(self, name: str) -> int:
        return int(self._resolve_name(name.encode() + b"\0"))

    def add_rule(
        self, context: Any, action: int, number: int, arguments: tuple[Argument, ...], name: str
    ) -> None:
        # struct scmp_arg_cmp: argument, operator, two operands.
        array = b"".join(
            struct.pack("=IiQQ", each.index, each.operator, each.value, each.value_two) for each in arguments
        )
        result = self._add_rules(context, action, number, len(arguments), array)
        if result != 0:
            raise SetupFailed(f"linux.seccomp: rule for {name}: {os.strerror(-result)}")

    def export(self, context: Any) -> bytes:
        fd = os.memfd_create("seccomp")
        try:
            result = self._export(context, fd)
            if result != 0:
                raise SetupFailed(f"linux.seccomp: no program could be made: {os.strerror(-result)}")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)

    def release(self, context: Any) -> None:
        self._release(context)

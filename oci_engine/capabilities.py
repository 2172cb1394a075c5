"""The capabilities of a process: five sets, by name in a specification, as bits in the kernel."""

from __future__ import annotations

from oci_engine import linux
from oci_engine.undo import suppress

#: In the order of their numbers, linux/capability.h.
NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_NUMBERS = {name: number for number, name in enumerate(NAMES)}
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4


def bits(names: tuple[str, ...]) -> int:
    """Of capabilities by name. Raises KeyError for a name that is none."""
    word = 0
    for name in names:
        word |= 1 << _NUMBERS[name]
    return word


def is_known(name: str) -> bool:
    return name in _NUMBERS


def names_in(word: int) -> list[str]:
    return [name for number, name in enumerate(NAMES) if word >> number & 1]


def last_of_kernel() -> int:
    """The highest number that this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def limit_bounding(allowed: int, last: int) -> None:
    """Drop from the bounding set all that is not allowed, also what the specification has no name for."""
    for number in range(last + 1):
        if not allowed >> number & 1:
            try:
                linux.prctl(linux.PR_CAPBSET_DROP, number)
            except PermissionError:
                if linux.prctl(linux.PR_CAPBSET_READ, number):
                    raise


def set_all(effective: int, permitted: int, inheritable: int, ambient: int) -> None:
    """The four sets beside the bounding one. Ambient ones need their bit in permitted and inheritable."""
    linux.capset(effective, permitted, inheritable)
    with suppress(OSError):  # EINVAL: a kernel without ambient capabilities has none to clear
        linux.prctl(linux.PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    for number in range(ambient.bit_length()):
        if ambient >> number & 1:
            linux.prctl(linux.PR_CAP_AMBIENT, _AMBIENT_RAISE, number)

"""System calls that Python's standard library does not offer, as functions that raise OSError.

Through `_ctypes` itself: the Python half of ctypes defines dozens of types that are not needed for this. Calls from
424 on have one number on all architectures; the few older ones without a wrapper in libc are in a table.
"""

from __future__ import annotations

import _ctypes
import os
import struct

# Not from `typing`, whose import takes as long as the whole interpreter's start; here and everywhere in this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# unshare(2), setns(2), clone3(2)
CLONE_NEWTIME = 0x00000080
CLONE_FS = 0x00000200
CLONE_FILES = 0x00000400
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# mount(2), umount2(2)
MS_REC = 0x4000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2

# linux/magic.h
PROC_SUPER_MAGIC = 0x9FA0
DEVPTS_SUPER_MAGIC = 0x1CD1

# openat2(2)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_IDMAP = 0x100000
_CLOEXEC = os.O_CLOEXEC
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
# seccomp(2)
SECCOMP_FILTER_FLAG_TSYNC = 1
SECCOMP_FILTER_FLAG_LOG = 2
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 32

_CAPABILITY_VERSION_3 = 0x20080522

# asm/ioctls.h
TIOCSCTTY = 0x540E
TIOCSWINSZ = 0x80087467 if os.uname().machine.startswith("ppc") else 0x5414

_SINCE_424 = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435,
    "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
#: Of each architecture's asm/unistd.h.
_OLDER = {
    "x86_64": {"keyctl": 250, "ioprio_set": 251, "sched_setattr": 314, "seccomp": 317, "bpf": 321},
    "aarch64": {"keyctl": 219, "ioprio_set": 30, "sched_setattr": 274, "seccomp": 277, "bpf": 280},
    "riscv64": {"keyctl": 219, "ioprio_set": 30, "sched_setattr": 274, "seccomp": 277, "bpf": 280},
    "s390x": {"keyctl": 280, "ioprio_set": 282, "sched_setattr": 345, "seccomp": 348, "bpf": 351},
    "ppc64le": {"keyctl": 271, "ioprio_set": 273, "sched_setattr": 355, "seccomp": 358, "bpf": 361},
}
_NUMBERS = _SINCE_424 | _OLDER.get(os.uname().machine, {})

_FUNCFLAG_CDECL, _FUNCFLAG_PYTHONAPI, _FUNCFLAG_USE_ERRNO = 1, 4, 8


# typeshed describes `ctypes`, whose types are more than what `_ctypes` itself asks for: hence the ignores.


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Unsigned(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "I"


class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """An argument as wide as a register: a number, the address of bytes or of an array, or None."""

    _type_ = "P"


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Libc:
    """What `_ctypes` takes for a library: an object with the handle of dlopen. None is the program itself."""

    _handle = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


class _ReturnsLong(_ctypes.CFuncPtr):
    _flags_ = _FUNCFLAG_CDECL | _FUNCFLAG_USE_ERRNO
    _restype_ = _Long


class _ReturnsInt(_ctypes.CFuncPtr):
    _flags_ = _FUNCFLAG_CDECL | _FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _ReturnsUnsigned(_ctypes.CFuncPtr):
    _flags_ = _FUNCFLAG_CDECL | _FUNCFLAG_USE_ERRNO
    _restype_ = _Unsigned


class _HoldsTheGil(_ctypes.CFuncPtr):
    """For the one call that returns twice: the child must not have to take the interpreter's lock again."""

    _flags_ = _FUNCFLAG_CDECL | _FUNCFLAG_USE_ERRNO | _FUNCFLAG_PYTHONAPI
    _restype_ = _Long


def _function(kind: Any, name: str, arguments: int, library: object = _Libc) -> Any:
    function = kind((name, library))
    function.argtypes = (_Word,) * arguments
    return function


class Library:
    """Functions of a shared library, with arguments as wide as a register. Raises OSError when it is not there."""

    def __init__(self, name: str) -> None:
        self._handle = _ctypes.dlopen(name, os.RTLD_NOW)

    def returns_int(self, name: str, arguments: int) -> Any:
        return _function(_ReturnsInt, name, arguments, self)

    def returns_unsigned(self, name: str, arguments: int) -> Any:
        return _function(_ReturnsUnsigned, name, arguments, self)

    def returns_address(self, name: str, arguments: int) -> Any:
        """0 for none."""
        return _function(_ReturnsLong, name, arguments, self)


_syscall = _function(_ReturnsLong, "syscall", 7)
_syscall_with_gil = _function(_HoldsTheGil, "syscall", 7)
_unshare = _function(_ReturnsInt, "unshare", 1)
_setns = _function(_ReturnsInt, "setns", 2)
_mount = _function(_ReturnsInt, "mount", 5)
_umount2 = _function(_ReturnsInt, "umount2", 2)
_pivot_root = _function(_ReturnsInt, "pivot_root", 2)
_prctl = _function(_ReturnsInt, "prctl", 5)
_setrlimit = _function(_ReturnsInt, "setrlimit", 2)
_capset = _function(_ReturnsInt, "capset", 2)
_setdomainname = _function(_ReturnsInt, "setdomainname", 2)
_personality = _function(_ReturnsInt, "personality", 1)
_fstatfs = _function(_ReturnsInt, "fstatfs", 2)


def buffer(data: bytes) -> Any:
    """Memory that stays where it is, and that the kernel may write to; `bytes(buffer)` reads it."""
    memory = (_Char * len(data))()
    memory[:] = data  # type: ignore[call-overload]
    return memory


def address(memory: Any) -> int:
    """Of a buffer, for structures that point to others."""
    return _ctypes.addressof(memory)


def _check(result: int, call: str, what: object = "") -> int:
    if result == -1:
        number = _ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", str(what) if what != "" else None)
    return result


def _call(name: str, *arguments: object, what: object = "") -> int:
    try:
        number = _NUMBERS[name]
    except KeyError:
        raise OSError(38, f"{name}: its number is not known for {os.uname().machine}") from None
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    return _check(_syscall(number, *padded), name, what)


def _path(path: str) -> bytes:
    return os.fsencode(path) + b"\0"


def unshare(flags: int) -> None:
    _check(_unshare(flags), "unshare", hex(flags))


def setns(fd: int, kind: int) -> None:
    _check(_setns(fd, kind), "setns")


def clone_sibling() -> int:
    """Like fork(2), but the new process is a child of this one's parent. Only in a process of one thread."""
    arguments = struct.pack("=8Q", CLONE_PARENT, 0, 0, 0, 0, 0, 0, 0)
    return _check(_syscall_with_gil(_NUMBERS["clone3"], arguments, len(arguments), 0, 0, 0, 0), "clone3")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (
        _path(source),
        _path(target),
        _path(kind) if kind else None,
        flags,
        _path(data) if data else None,
    )
    _check(_mount(*arguments), "mount", target)


def umount(target: str, flags: int = 0) -> None:
    _check(_umount2(_path(target), flags), "umount2", target)


def pivot_root(new: str, old: str) -> None:
    _check(_pivot_root(_path(new), _path(old)), "pivot_root")


def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    how = struct.pack("=3Q", flags | _CLOEXEC, mode, resolve)
    return _call("openat2", directory, _path(path), how, len(how), what=path)


def open_tree(directory: int, path: str, flags: int) -> int:
    return _call("open_tree", directory, _path(path), flags | _CLOEXEC, what=path)


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount at what `target_fd` is open on."""
    empty = b"\0"
    _call("move_mount", mount_fd, empty, target_fd, empty, MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def mount_setattr(
    fd: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns: int = 0, recursive: bool = False
) -> None:
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    attributes = struct.pack("=4Q", set_, clear, propagation, userns)
    _call("mount_setattr", fd, b"\0", flags, attributes, len(attributes))


def fsopen(kind: str) -> int:
    return _call("fsopen", _path(kind), _FSOPEN_CLOEXEC, what=kind)


def fsconfig(fd: int, key: str, value: str | None) -> None:
    if value is None:
        _call("fsconfig", fd, _FSCONFIG_SET_FLAG, _path(key), None, 0, what=key)
    else:
        _call("fsconfig", fd, _FSCONFIG_SET_STRING, _path(key), _path(value), 0, what=f"{key}={value}")


def fscreate(fd: int) -> None:
    _call("fsconfig", fd, _FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(fd: int, attributes: int = 0) -> int:
    return _call("fsmount", fd, _FSMOUNT_CLOEXEC, attributes)


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    _call("close_range", first, last, 0)


def prctl(option: int, second: object = 0, third: object = 0) -> int:
    return _check(_prctl(option, second, third, 0, 0), "prctl", option)


def setrlimit(number: int, soft: int, hard: int) -> None:
    """Python's own is a library that takes as long to load as all else of this."""
    _check(_setrlimit(number, struct.pack("=2Q", soft, hard)), "setrlimit")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    halves = [
        word & 0xFFFFFFFF for shift in (0, 32)
        for word in (effective >> shift, permitted >> shift, inheritable >> shift)
    ]  # fmt: skip
    _check(_capset(header, struct.pack("=6I", *halves)), "capset")


def setdomainname(name: str) -> None:
    data = os.fsencode(name)
    _check(_setdomainname(data, len(data)), "setdomainname", name)


def personality(persona: int) -> None:
    _check(_personality(persona), "personality", hex(persona))


def join_session_keyring(name: str) -> None:
    _call("keyctl", 1, _path(name))  # KEYCTL_JOIN_SESSION_KEYRING


def ioprio_set(priority: int) -> None:
    _call("ioprio_set", 1, 0, priority)  # IOPRIO_WHO_PROCESS, this one


def sched_setattr(attributes: bytes) -> None:
    _call("sched_setattr", 0, attributes, 0)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of another process's open file."""
    return _call("pidfd_getfd", pidfd, fd, 0)


def seccomp_filter(program: bytes, flags: int) -> int:
    """Install a filter: an array of struct sock_filter. Returns the listener if the flags ask for one."""
    memory = buffer(program)
    header = struct.pack("=H6xQ", len(program) // 8, address(memory))
    return _call("seccomp", 1, flags, header)  # SECCOMP_SET_MODE_FILTER


def bpf(command: int, attributes: bytes) -> int:
    return _call("bpf", command, attributes, len(attributes))


def bpf_memory(command: int, attributes: Any) -> int:
    """With a buffer, for commands that answer in it."""
    return _call("bpf", command, attributes, len(attributes))


def fs_type(fd: int) -> int:
    """The magic number of the file system that a file is on, of fstatfs(2)."""
    memory = buffer(bytes(256))
    _check(_fstatfs(fd, memory), "fstatfs")
    (magic,) = struct.unpack_from("@I" if os.uname().machine == "s390x" else "@l", bytes(memory))
    return int(magic) & 0xFFFFFFFF

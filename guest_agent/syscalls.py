"""The few system calls that Python's standard library does not offer.

Through `_ctypes` itself and not through `ctypes`: the Python half of ctypes defines dozens of types that are
not needed for this, and costs a fifth of a second at every guest start under emulation.
"""

from __future__ import annotations

import _ctypes
import os

# Flags of mount(2) and umount2(2).
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2

# Commands of reboot(2).
RB_AUTOBOOT = 0x01234567
RB_POWER_OFF = 0x4321FEDC

# Of swapon(2): tell the disk of what is free.
SWAP_FLAG_DISCARD = 0x10000

IN_MODIFY = 2
_IN_NONBLOCK, _IN_CLOEXEC = 0o4000, 0o2000000


CLONE_NEWPID = 0x20000000

# <malloc.h>
_M_ARENA_MAX = -8

_FUNCFLAG_CDECL = 1
_FUNCFLAG_USE_ERRNO = 8


# typeshed describes `ctypes`, whose types are more than what `_ctypes` itself asks for: hence the ignores.


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Ulong(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Bytes(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A `const char *`; None is NULL."""

    _type_ = "z"


class _Libc:
    """What `_ctypes` takes for a library: an object with the handle of dlopen. None is the program itself."""

    _handle = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


class _Function(_ctypes.CFuncPtr):
    _flags_ = _FUNCFLAG_CDECL | _FUNCFLAG_USE_ERRNO
    _restype_ = _Int


def _function(name: str, *argtypes: type) -> _Function:
    function = _Function((name, _Libc))  # type: ignore[arg-type]
    function.argtypes = argtypes
    return function


_mount = _function("mount", _Bytes, _Bytes, _Bytes, _Ulong, _Bytes)
_umount2 = _function("umount2", _Bytes, _Int)
_init_module = _function("init_module", _Bytes, _Ulong, _Bytes)
_inotify_init1 = _function("inotify_init1", _Int)
_inotify_add_watch = _function("inotify_add_watch", _Int, _Bytes, _Int)
_inotify_rm_watch = _function("inotify_rm_watch", _Int, _Int)
_reboot = _function("reboot", _Ulong)
_unshare = _function("unshare", _Int)
_syncfs = _function("syncfs", _Int)
_swapon = _function("swapon", _Bytes, _Int)
_setns = _function("setns", _Int, _Int)
_mallopt = _function("mallopt", _Int, _Int)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = _ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError with the target as its file name."""
    arguments = (source.encode(), os.fsencode(target), fstype.encode(), flags, data.encode() or None)
    _check(_mount(*arguments), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    _check(_umount2(os.fsencode(target), flags), target)


def init_module(image: bytes, parameters: str, name: str) -> None:
    """Load a kernel module from its ELF image. Raises OSError; EEXIST when it is loaded already."""
    _check(_init_module(image, len(image), parameters.encode()), name)


def reboot(command: int) -> None:
    """Stop the machine at once, without unmounting anything. Returns only by raising OSError."""
    _check(_reboot(command), "reboot")


def inotify_init() -> int:
    """A non-blocking inotify descriptor. Raises OSError."""
    fd = int(_inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    _check(min(fd, 0), "inotify")
    return fd


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """A watch descriptor; the same one again for the same file. Raises OSError."""
    handle = int(_inotify_add_watch(fd, os.fsencode(path), mask))
    _check(min(handle, 0), path)
    return handle


def inotify_rm_watch(fd: int, handle: int) -> None:
    """A watch that the kernel dropped by itself, because its file is gone, is not an error."""
    _inotify_rm_watch(fd, handle)


def unshare(flags: int) -> None:
    """unshare(2). Python has it from 3.12 on. Raises OSError."""
    _check(_unshare(flags), "unshare")


def syncfs(fd: int) -> None:
    """syncfs(2). Raises OSError."""
    _check(_syncfs(fd), "syncfs")


def swapon(path: str, flags: int = 0) -> None:
    """swapon(2). Raises OSError."""
    _check(_swapon(os.fsencode(path), flags), path)


def use_one_heap() -> None:
    """Let threads allocate from the heap there is, in the place of making one each: they run one at a time anyway."""
    _mallopt(_M_ARENA_MAX, 1)


def setns(fd: int, kind: int) -> None:
    """setns(2). Raises OSError."""
    _check(_setns(fd, kind), "setns")

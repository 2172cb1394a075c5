"""The virtual machine seen from inside: processors and memory that come online, clock, entropy, what it can do."""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import struct
import time

from guest_agent.errors import InvalidRequest

_CLOCK_TOLERANCE_NS = 5_000_000
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
# <linux/sockios.h>, <linux/if.h>
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sH14x")
SYS = "/sys/devices/system"
VERSION_FILE = "/usr/lib/kata-py/version"


def version() -> str:
    """The agent's version as the image's builder wrote it down."""
    try:
        with open(VERSION_FILE) as file:
            return file.read().strip()
    except FileNotFoundError:
        return "unknown"


def bring_online(most: int, memory: bool, root: str = SYS) -> int:
    """Bring processors online until there are `most`, 0 for all; and all of the memory. Returns the number of
    processors online. Raises OSError."""
    online = _count(_read(f"{root}/cpu/online"))
    for number in _processors(root):
        path = f"{root}/cpu/cpu{number}/online"
        if (online < most or not most) and _read(path) == "0":
            _write(path, "1")
            online += 1
    if memory and os.path.isdir(f"{root}/memory"):
        for name in sorted(os.listdir(f"{root}/memory")):
            path = f"{root}/memory/{name}/state"
            if name.startswith("memory") and _read(path) == "offline":
                try:
                    _write(path, "online")
                except OSError:
                    if _read(path) == "offline":
                        raise
                    # The kernel has brought it online by itself meanwhile, and calls this invalid.
    return _count(_read(f"{root}/cpu/online"))


def take_offline(left: int, root: str = SYS) -> None:
    """Take processors offline until so many are left, but never the first one. Raises OSError."""
    online = _count(_read(f"{root}/cpu/online"))
    for number in reversed(_processors(root)[1:]):
        path = f"{root}/cpu/cpu{number}/online"
        if online > left and _read(path) == "1":
            _write(path, "0")
            online -= 1


def _processors(root: str) -> list[int]:
    return sorted(
        int(name[3:]) for name in os.listdir(f"{root}/cpu") if name.startswith("cpu") and name[3:].isdigit()
    )


def memory_block_bytes(root: str = SYS) -> int:
    """Size of the pieces in which memory can be added, 0 when it cannot."""
    text = _read(f"{root}/memory/block_size_bytes")
    return int(text, 16) if text else 0


def can_probe_memory(root: str = SYS) -> bool:
    return os.path.exists(f"{root}/memory/probe")


def set_clock(seconds: int, microseconds: int) -> None:
    """Set the time of day, unless it is as good as that: programs see no jump for what is the message's own delay.
    Raises InvalidRequest, OSError."""
    if seconds < 0 or not 0 <= microseconds < 1_000_000:
        raise InvalidRequest(f"{seconds} seconds and {microseconds} microseconds are no time of day")
    wanted_ns = seconds * 1_000_000_000 + microseconds * 1000
    if abs(wanted_ns - time.time_ns()) > _CLOCK_TOLERANCE_NS:
        time.clock_settime_ns(time.CLOCK_REALTIME, wanted_ns)


def reseed(data: bytes) -> None:
    """Mix bytes from the host into the random number generator and have it start from them. Raises OSError."""
    fd = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _count(ranges: str) -> int:
    """ "0-2,5" are four."""
    total = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if first:
            total += int(last or first) - int(first) + 1
    return total


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.EINVAL, errno.EACCES):
            return ""
        raise


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def raise_loopback() -> None:
    """Let programs reach each other on 127.0.0.1 and ::1. Raises OSError."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        if not flags & _IFF_UP:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))
    finally:
        sock.close()

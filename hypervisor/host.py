"""What this host can do, read from a root directory so that tests can show another host.

Nothing is remembered between calls: a module loaded or a device node created later is seen.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path

_CPUID = struct.Struct("=4I")
_SYS_IO_URING_SETUP = 425  # the same on all architectures
_STABLE_TSC = frozenset({"constant_tsc", "nonstop_tsc"})


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host as seen below `root`; `arch` is its architecture as `uname -m` says it."""

    root: Path = Path("/")
    arch: str = platform.machine()

    def why_not_openable(self, device: str) -> str | None:
        """None when `device` (relative to the root) opens for reading and writing, else the reason."""
        try:
            os.close(os.open(self.root / device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as err:
            return err.strerror or str(err)
        return None

    def switched_on(self, parameter: str) -> bool:
        """Whether a kernel module's parameter (relative to the root) is on; one that is not there is not."""
        try:
            return (self.root / parameter).read_text().strip() in ("Y", "1")
        except OSError:
            return False

    def kernel_words(self) -> str:
        """The command line of the host's kernel; empty when it cannot be read."""
        try:
            return (self.root / "proc/cmdline").read_text(errors="replace")
        except OSError:
            return ""

    def cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of a leaf of CPUID, from the first processor. Raises OSError when it cannot be read."""
        path = self.root / "dev/cpu/0/cpuid"
        with open(path, "rb", buffering=0) as file:
            registers = os.pread(file.fileno(), _CPUID.size, leaf)
        if len(registers) != _CPUID.size:
            raise OSError(errno.EIO, "it ends before this leaf", str(path))
        eax, ebx, ecx, edx = _CPUID.unpack(registers)
        return eax, ebx, ecx, edx

    def has_io_uring(self) -> bool:
        """Whether this process may use it: kernels, administrators and seccomp filters can forbid it."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall(_SYS_IO_URING_SETUP, 0, None)  # an error in any case; which one is the answer
        return ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM)

    def cpuinfo(self) -> dict[str, str]:
        """The entries of the first processor in /proc/cpuinfo; empty when there is no such file."""
        entries: dict[str, str] = {}
        try:
            with open(self.root / "proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    key, colon, value = line.partition(":")
                    if not colon:
                        break  # the blank line after the first of perhaps hundreds
                    entries[key.strip()] = value.strip()
        except OSError:
            return {}
        return entries

    def cpu_flags(self) -> frozenset[str]:
        return frozenset(self.cpuinfo().get("flags", "").split())

    def has_selinux(self) -> bool:
        """Whether the kernel labels processes by a policy of SELinux."""
        return (self.root / "sys/fs/selinux/enforce").exists()

    def tsc_khz(self) -> int | None:
        """The rate of the processor's time stamp counter, or None when it cannot be told for certain.

        "cpu MHz" is that rate only where the kernel has no live frequency to show instead: without the
        aperfmperf counters and without a cpufreq driver, as in most virtual machines. A wrong number would
        make the guest's clock drift, so any doubt means None and the guest measures for itself.
        """
        cpuinfo = self.cpuinfo()
        flags = frozenset(cpuinfo.get("flags", "").split())
        if not flags >= _STABLE_TSC or "aperfmperf" in flags:
            return None
        if (self.root / "sys/devices/system/cpu/cpu0/cpufreq").exists():
            return None
        try:
            return round(float(cpuinfo["cpu MHz"]) * 1000)
        except (KeyError, ValueError):
            return None

"""What can go wrong with a virtual machine, in the words of this package.

    HypervisorError
    ├── HostUnsupported       the host lacks what the configuration demands (KVM, vhost-vsock)
    ├── InvalidSpec           a value that cannot be put on QEMU's command line
    ├── ProgramNotFound       QEMU or virtiofsd cannot be started
    ├── DeviceUnavailable     a device of the host that cannot be given to a guest as it is
    ├── BootFailed            the machine did not come up, or went away while coming up
    ├── HotplugRefused        the guest does not take a device, or keeps one that shall go
    ├── DumpFailed            the memory of a guest that gave up was not saved
    └── QmpError              QEMU's monitor
        ├── QmpUnavailable    no handshake within the time allowed, or the connection is gone
        └── QmpRefused        QEMU answered a command with an error

Every message is one line: what failed, why, what to do. Details that need more room are attributes.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hypervisor.process import ProcessExit


#: What the host is short of for the moment, whatever it was asked for.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


class HypervisorError(Exception):
    """Base of all errors raised by this package."""


class HostUnsupported(HypervisorError):
    """The host cannot do what an explicit setting asks for."""


class InvalidSpec(HypervisorError):
    """A value of the specification has no safe form on a command line."""


class DeviceUnavailable(HypervisorError):
    """A device of the host is not there, or not ready to be given to a guest."""


class ProgramNotFound(HypervisorError):
    """A helper program is missing or cannot be executed."""

    def __init__(self, program: str | Path, why: str, remedy: str) -> None:
        super().__init__(f"cannot start {program}: {why}; {remedy}")
        self.program = str(program)
        self.why = why


class BootFailed(HypervisorError):
    """The machine did not come up.

    `exit` is how the program that failed ended (None while it still ran), `stderr_tail` its last lines, and
    `console_tail` the guest's last lines on the serial console.
    """

    def __init__(
        self,
        what: str,
        why: str,
        remedy: str,
        *,
        exit: ProcessExit | None = None,
        stderr_tail: Sequence[str] = (),
        console_tail: Sequence[str] = (),
    ) -> None:
        super().__init__(f"{what}: {why}; {remedy}")
        self.exit = exit
        self.stderr_tail = tuple(stderr_tail)
        self.console_tail = tuple(console_tail)


class HotplugRefused(HypervisorError):
    """A running machine did not take a device, or did not let go of it."""


class DumpFailed(HypervisorError):
    """The guest's memory could not be saved."""


class QmpError(HypervisorError):
    """Something about QEMU's monitor."""


class QmpUnavailable(QmpError):
    """The monitor does not answer or the connection to it is gone."""


class QmpRefused(QmpError):
    """QEMU executed a command and answered with an error; `kind` is QEMU's error class."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description} ({kind})")
        self.command = command
        self.kind = kind

"""QEMU as a user that nobody else is: what a guest could make of a QEMU that it has broken into ends there.

Such a user has no name and no entry anywhere, so nothing has to be made before a start or removed after the end: it
is a number out of a range that no distribution gives to anybody, and while a machine runs no other process has it.
QEMU needs no more: its sockets, the console, files for a dump and with initial data, /dev/vhost-vsock are opened here
and handed over. What it opens by itself (kernel, images, /dev/kvm) has to be open to such a user; that is looked at
before the start.

virtiofsd stays root's: it makes files for all users of the guest.
"""

from __future__ import annotations

import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.errors import HostUnsupported, InvalidSpec
from hypervisor.process import spawned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hypervisor.spec import Accel, VmSpec
    from hypervisor.vfio import HostDevice

# systemd's list of what user ids are for ends its ranges for containers just below, and has this one as unused.
FIRST_ID = 0x7000_0000
IDS = 1 << 27
_VFIO_CONTROL = Path("/dev/vfio/vfio")


@dataclass(frozen=True, kw_only=True)
class User:
    """The ids that a program runs as. It has no other group than these."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def choose_user(sandbox_id: str, accel: Accel, *, root: Path = Path("/")) -> User:
    """A user whom no process belongs to. Raises HostUnsupported when it could not use the accelerator.

    The number comes from the sandbox's id: two that start at the same moment, before either can be seen, do not meet.
    """
    taken = {owner for entry in os.scandir(root / "proc") if (owner := _owner(entry)) is not None}
    first = zlib.crc32(sandbox_id.encode()) % IDS
    number = next(FIRST_ID + n % IDS for n in range(first, first + IDS) if FIRST_ID + n % IDS not in taken)
    return User(uid=number, gid=number, groups=_groups(accel, root / "dev/kvm"))


def _owner(process: os.DirEntry[str]) -> int | None:
    try:
        return process.stat().st_uid if process.name.isdigit() else None
    except OSError:  # it has ended
        return None


def _groups(accel: Accel, kvm: Path) -> tuple[int, ...]:
    if accel != "kvm":
        return ()
    status = kvm.stat()
    if status.st_mode & 0o006 == 0o006:
        return ()
    # Group 0 is root's, and with it comes more than KVM.
    if status.st_mode & 0o060 == 0o060 and status.st_gid != 0:
        return (status.st_gid,)
    raise HostUnsupported(
        f"/dev/kvm is open to root only ({stat.filemode(status.st_mode)}), and QEMU is to run as another user; "
        "give it to the group kvm with mode 0660, or remove rootless"
    )


async def check(spec: VmSpec, user: User) -> None:
    """Raise HostUnsupported for a file that QEMU could not open as that user, InvalidSpec for what only root can do."""
    if spec.hugepages:
        raise InvalidSpec("huge pages are for root only; remove enable_hugepages or rootless")
    if spec.extra_monitor is not None:
        raise InvalidSpec(
            "QEMU cannot make a socket in root's directory; remove extra_monitor_socket or rootless"
        )
    if spec.exports:
        raise InvalidSpec(
            f"only root can serve files of all owners, and guests with {spec.arch} get theirs from QEMU; "
            'remove rootless or set shared_fs to "none"'
        )
    await require(user, _opened(spec))


async def require(user: User, opened: Iterable[tuple[str, Path]]) -> None:
    """Raise HostUnsupported for a file that the user cannot open, by `test`'s word for what it has to pass."""
    for access, path in opened:
        async with spawned(["/usr/bin/test", access, str(path)], user=user) as process:
            if (await process.wait()).status != 0:
                verb = {"-r": "read", "-w": "write to", "-x": "run"}[access]
                raise HostUnsupported(
                    f"QEMU cannot {verb} {path} as another user than root; "
                    "open it and its folders to all users, or remove rootless"
                )


def _opened(spec: VmSpec) -> Iterator[tuple[str, Path]]:
    """What QEMU opens by its path, and the test that the user has to pass."""
    yield "-x", spec.qemu_path
    images = (extension.image for extension in spec.extensions)
    for path in (spec.kernel, spec.initrd, spec.image, spec.firmware, *spec.pflash, *images):
        if path is not None:
            yield "-r", path
    if spec.entropy_source is not None:
        yield "-r", spec.entropy_source
    if spec.memory_dir is not None:
        yield "-w", spec.memory_dir
    yield from device_files(spec.host_devices)


def device_files(devices: Iterable[HostDevice]) -> Iterator[tuple[str, Path]]:
    """What QEMU opens by itself of the host's devices: their groups. Own files are opened for it."""
    groups = {device.file for device in devices if device.own_file is None}
    if groups:
        yield from (("-w", path) for path in (_VFIO_CONTROL, *sorted(groups)))

"""Switches like those of `args`, of which an ordinary machine has none.

They are apart because making a class takes longer than writing a switch, and an ordinary start pays for none of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.qemu.args import Device, Head, Props, join_props, quoted

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.qemu.args import MemoryPolicy, Nodes


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AddFd(Props):
    """`-add-fd`: an inherited descriptor that QEMU opens as `/dev/fdset/SET`."""

    fd: int
    set: int

    def argv(self) -> list[str]:
        return ["-add-fd", f"fd={self.fd},set={self.set}"]


class Pflash(Head):
    """`-drive if=pflash` with the firmware's code, which the guest cannot change."""

    def argv(self) -> list[str]:
        return ["-drive", f"if=pflash,format=raw,readonly=on,file={quoted(self.value)}"]


class VolatilePflash(Head):
    """`-drive if=pflash` with the firmware's variables: many guests share the file, and none may keep changes."""

    def argv(self) -> list[str]:
        return ["-drive", f"if=pflash,format=raw,snapshot=on,file={quoted(self.value)}"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MemoryBackendFile(Props):
    """`-object memory-backend-file`: a file as memory, or one without a name in a directory."""

    id: str
    mem_path: Path
    size: str
    share: bool
    prealloc: bool | None = None
    readonly: bool | None = None
    host_nodes: Nodes | None = None
    policy: MemoryPolicy | None = None

    def argv(self) -> list[str]:
        return ["-object", join_props("memory-backend-file", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChardevListener(Props):
    """`-chardev socket` on a path, for whoever connects."""

    id: str
    path: Path
    server: bool = True
    wait: bool = False

    def argv(self) -> list[str]:
        return ["-chardev", join_props("socket", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FsdevLocal(Props):
    """`-fsdev local`: a directory with what is mounted in it; owners and modes are those of the files."""

    id: str
    path: Path

    def argv(self) -> list[str]:
        # This property has an underscore, unlike those of devices.
        return ["-fsdev", join_props("local", self, raw="security_model=passthrough,multidevs=remap")]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Virtio9p(Device):
    """An `-fsdev` as the guest sees it."""

    fsdev: str
    mount_tag: str

    def argv(self) -> list[str]:
        props = join_props(
            self.driver, self, skip=("driver", "mount_tag"), raw=f"mount_tag={quoted(self.mount_tag)}"
        )
        return ["-device", props]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Nvdimm(Device):
    """Persistent memory; `unarmed` tells the guest that what it writes would not last."""

    memdev: str
    unarmed: bool = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IommuDevice(Device):
    """A virtual IOMMU; its properties are the architecture's."""

    raw: str

    def argv(self) -> list[str]:
        return ["-device", join_props(self.driver, self, skip=("driver", "raw"), raw=self.raw)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PciePort(Device):
    """A port for one device: of the root complex or of a switch. `chassis` and `slot` name it to the guest."""

    id: str
    bus: str
    chassis: int | None = None
    slot: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IoThread(Props):
    """`-object iothread`: a thread of QEMU that serves a device."""

    id: str

    def argv(self) -> list[str]:
        return ["-object", join_props("iothread", self)]


class PvPanic(Device):
    """What a guest's kernel writes to when it panics."""


class NoShutdown:
    """`-no-shutdown`: QEMU stops when the guest shuts down, resets or panics, and does not end."""

    def argv(self) -> list[str]:
        return ["-no-shutdown"]

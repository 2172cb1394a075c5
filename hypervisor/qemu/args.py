"""One frozen dataclass per QEMU switch. Fields carry QEMU's own property names (`-` becomes `_`).

A device made of several switches is put together in `cmdline.py`. Every value passes `text()`, which refuses
what cannot be one argument, and every property passes `quoted()`, which doubles commas, so a path or a tag
can never become a second property. Only fields named `raw` are taken as the user wrote them: property lists
in QEMU's own form, such as Kata's `cpu_features`.

Switches are written, never compared or printed: without `eq` and `repr` this module loads in half the time,
and it is loaded between a request for a machine and QEMU's start.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from hypervisor.errors import InvalidSpec

if TYPE_CHECKING:
    from hypervisor.spec import BlockAio

Value = str | int | bool | Path
Nodes = tuple[int, ...]
"""Of the host, in a property that QEMU takes once for each."""
MemoryPolicy = Literal["bind"]
# QEMU itself mixes both ways to separate words.
_UNDERSCORED = frozenset({"chassis_nr", "iommu_platform", "rx_queue_size", "tx_queue_size"})


class Switch(Protocol):
    """What the builder needs of a switch: its words, ready for the argument list."""

    def argv(self) -> list[str]: ...


def text(value: Value) -> str:
    """A value as QEMU spells it. Raises InvalidSpec for line breaks and NUL."""
    if isinstance(value, bool):
        return "on" if value else "off"
    word = str(value)
    if any(c in word for c in "\n\r\0"):
        raise InvalidSpec(f"a QEMU argument cannot hold a line break or NUL: {word[:80]!r}")
    return word


def quoted(value: Value) -> str:
    """A value inside a comma separated list."""
    return text(value).replace(",", ",,")


@dataclass(frozen=True, eq=False, repr=False)
class Head:
    """Base of switches whose value is one word: `-kernel FILE`."""

    value: Value


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Props:
    """Base of switches whose value is a property list."""


def join_props(head: Value, props: Props, *, skip: tuple[str, ...] = (), raw: str = "") -> str:
    """`head,key=value,...` in field order. None is left out, and so are the fields in `skip`; two underscores are the
    dot in a property's name.
    """
    words = [quoted(head)]
    for field in fields(props):
        value = getattr(props, field.name)
        if value is not None and field.name not in skip:
            name = _qemus_name(field.name)
            words += [f"{name}={quoted(each)}" for each in (value if isinstance(value, tuple) else (value,))]
    if raw:
        words.append(text(raw))
    return ",".join(words)


def _qemus_name(field: str) -> str:
    return field if field in _UNDERSCORED else field.replace("__", ".").replace("_", "-")


# Words


class Name(Head):
    """`-name`: shown by `ps`, and QEMU's name for the guest in its messages."""

    def argv(self) -> list[str]:
        # QEMU would take what is before it for an option.
        if "=" in text(self.value):
            raise InvalidSpec(f"a machine's name cannot hold =: {self.value}")
        return ["-name", quoted(self.value)]


class Kernel(Head):
    """`-kernel`."""

    def argv(self) -> list[str]:
        return ["-kernel", text(self.value)]


class Initrd(Head):
    """`-initrd`."""

    def argv(self) -> list[str]:
        # As it is: commas separate modules of multiboot kernels only, which Linux is none of.
        return ["-initrd", text(self.value)]


class Append(Head):
    """`-append`: the kernel's command line."""

    def argv(self) -> list[str]:
        return ["-append", text(self.value)]


class Bios(Head):
    """`-bios`: firmware in place of SeaBIOS."""

    def argv(self) -> list[str]:
        return ["-bios", text(self.value)]


class Sandbox(Head):
    """`-sandbox`: QEMU's own seccomp filter, in QEMU's words (`on,spawn=deny`)."""

    def argv(self) -> list[str]:
        return ["-sandbox", text(self.value)]


@dataclass(frozen=True, eq=False, repr=False)
class Fixed:
    """What every machine gets: no devices or files we did not name, no window, and a reboot is the end."""

    def argv(self) -> list[str]:
        return ["-vga", "none", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]


# Machine, processors, memory


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Smp(Props):
    """`-smp N[,maxcpus=M]`, and `sockets` when they matter; else QEMU makes one of all."""

    cpus: int
    sockets: int | None = None
    maxcpus: int | None = None

    def argv(self) -> list[str]:
        return ["-smp", join_props(self.cpus, self, skip=("cpus",))]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Machine(Props):
    """`-machine TYPE,...`."""

    type: str
    raw: str = ""
    memory_backend: str | None = None
    """None when nodes have the memory."""
    nvdimm: bool | None = None
    confidential_guest_support: str | None = None

    def argv(self) -> list[str]:
        return ["-machine", join_props(self.type, self, skip=("type", "raw"), raw=self.raw)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Accelerator(Props):
    """`-accel`. Not `-machine accel=`: that cannot carry `tb-size` (MiB of translated code, TCG only)."""

    accel: Literal["kvm", "tcg"]
    tb_size: int | None = None
    kernel_irqchip: Literal["split"] | None = None

    def argv(self) -> list[str]:
        return ["-accel", join_props(self.accel, self, skip=("accel",))]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cpu(Props):
    """`-cpu MODEL[,features]`."""

    model: str
    raw: str = ""

    def argv(self) -> list[str]:
        return ["-cpu", join_props(self.model, self, skip=("model", "raw"), raw=self.raw)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Memory(Props):
    """`-m SIZE[,slots=S,maxmem=X]`."""

    size: str
    slots: int | None = None
    maxmem: str | None = None

    def argv(self) -> list[str]:
        return ["-m", join_props(self.size, self, skip=("size",))]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MemoryBackendMemfd(Props):
    """`-object memory-backend-memfd`: guest memory that vhost-user devices may map, with no file system
    behind it.
    """

    id: str
    size: str
    share: bool = True
    prealloc: bool | None = None
    reserve: bool | None = None
    hugetlb: bool | None = None
    host_nodes: Nodes | None = None
    policy: MemoryPolicy | None = None

    def argv(self) -> list[str]:
        return ["-object", join_props("memory-backend-memfd", self)]


# Character devices and the monitor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChardevSocket(Props):
    """`-chardev socket` on an inherited file descriptor: connected, or listening when `server` is set."""

    id: str
    fd: int
    server: bool | None = None
    wait: bool | None = None

    def argv(self) -> list[str]:
        return ["-chardev", join_props("socket", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Mon(Props):
    """`-mon`."""

    chardev: str
    mode: Literal["control", "readline"] = "control"
    pretty: bool | None = None

    def argv(self) -> list[str]:
        return ["-mon", join_props(self.chardev, self, skip=("chardev",))]


class Serial(Head):
    """`-serial chardev:ID`: the board's own serial port."""

    def argv(self) -> list[str]:
        return ["-serial", f"chardev:{text(self.value)}"]


# Devices. `driver` is the device type, which differs by bus (see `hypervisor.arch`).


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Device(Props):
    """Base of `-device DRIVER,...`."""

    driver: str
    iommu_platform: bool | None = None

    def argv(self) -> list[str]:
        return ["-device", join_props(self.driver, self, skip=("driver",))]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SerialDevice(Device):
    """A serial port on a chardev."""

    chardev: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VhostUserVsock(Device):
    """virtio-vsock whose other side is a process; the guest's address comes from there."""

    chardev: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VhostVsock(Device):
    """virtio-vsock whose other side is the host's kernel, through an open /dev/vhost-vsock."""

    vhostfd: int
    guest_cid: int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VhostUserFs(Device):
    """virtiofs; the other side is a virtiofsd."""

    chardev: str
    tag: str
    queue_size: int
    cache_size: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BlockdevFile(Props):
    """`-blockdev driver=file`: a raw disk image."""

    node_name: str
    filename: Path | str
    read_only: bool = True
    aio: BlockAio | None = None
    cache__direct: bool | None = None
    cache__no_flush: bool | None = None

    def argv(self) -> list[str]:
        return ["-blockdev", join_props("driver=file", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioBlk(Device):
    """A virtio disk on a `-blockdev` node."""

    drive: str
    iothread: str | None = None
    serial: str | None = None
    queue_size: int | None = None
    num_queues: int | None = None

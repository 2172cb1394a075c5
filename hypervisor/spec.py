"""What a virtual machine is to be: plain frozen data, decided by the caller.

Everything that needs a decision (which accelerator, which vsock transport, how much memory) has been decided
when a `VmSpec` exists; `hypervisor.accel` helps with the decisions that depend on the host. Nothing here
touches the host.

Choices of shape:

- Empty text means "the default of the architecture" (`machine_type`, `cpu_model`), so a configuration file
  can be handed through as it is.
- Sizes are integers in MiB, times are seconds; both are in the name.
- Guest memory is shared: vhost-user devices (virtiofs, our vsock device) map it. A guest with `protection` shares
  none, and has none of these devices.
- Either `initrd` or `image` holds the guest's root file system. An image is attached read-only, as a virtio
  disk or as persistent memory, and its first partition is mounted by the kernel, or by `image_initrd` when the
  kernel has the drivers for that as modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.extension import Extension
    from hypervisor.protection import Protection
    from hypervisor.rootless import User
    from hypervisor.verity import Verity
    from hypervisor.vfio import HostDevice, PortKind

Accel = Literal["kvm", "tcg"]
VsockKind = Literal["user", "vhost"]
VirtioFsCache = Literal["never", "auto", "always", "metadata"]
RootfsType = Literal["ext4", "xfs", "erofs"]
RootfsDriver = Literal["virtio-blk", "nvdimm"]
ExtraMonitor = Literal["hmp", "qmp", "qmp-pretty"]
BlockAio = Literal["io_uring", "native", "threads"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A host directory that the guest mounts by `tag` through virtiofs."""

    tag: str
    directory: Path
    daemon: Path
    """The virtiofsd program, of either kind (QEMU's C daemon or the Rust one)."""
    cache: VirtioFsCache = "auto"
    queue_size: int = 1024
    """A power of two, at most 1024: the limit of QEMU's vhost-user-fs device."""
    dax_mib: int = 0
    """Window through which the guest maps files without copying them (DAX); 0 is none, and few QEMUs have one."""
    extra_args: tuple[str, ...] = ()
    """Kata's `virtio_fs_extra_args`, in the spelling of either daemon."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A host directory that QEMU itself serves, and the guest mounts by `tag` as 9p.

    For guests whose byte order is not the host's: virtiofs speaks its guest's, and virtiofsd knows only its own. 9p has
    one order for everybody.
    """

    tag: str
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Nic:
    """A network interface of the guest, joined to a tap that is made for it in the machine's network namespace."""

    id: str
    """QEMU's name of the device."""
    mac: str
    tap: str
    """The tap's name, at most 15 bytes."""
    queues: int = 1
    """Queue pairs: how many processors can send and receive at once."""
    vhost: bool = True
    """Let the host's kernel carry the packets where it can (`/dev/vhost-net`)."""
    parent: int = 0
    """Index of the interface in that namespace that the tap is a macvtap of; 0 makes an ordinary tap."""
    existing: bool = False
    """The tap is somebody else's, who has made it, and stays."""
    vhost_user: Path | None = None
    """A socket whose server carries the packets, in place of a tap."""
    queue_size: int = 0
    """Places in each queue, 256 to 1024; 0 is the VMM's own size."""


@dataclass(frozen=True, kw_only=True)
class VhostUserDisk:
    """A disk that is plugged into a running machine, and that another program of the host serves."""

    id: str
    """QEMU's name of the disk."""
    socket: Path
    """Where that program listens, for vhost-user-blk."""


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    """Memory and processors of the guest that are near each other."""

    host_nodes: tuple[int, ...] = ()
    """The nodes of the host that its memory comes from; empty leaves that to the host."""
    distances: tuple[int, ...] = ()
    """To every node of the guest, as ACPI counts: 10 to itself, more to others. Empty is QEMU's way: 20 to others."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk that is plugged into a running machine. What is on it, a block device or a file, its opener says."""

    id: str
    """QEMU's name of the disk, at most 31 characters."""
    read_only: bool = False
    shared: bool = False
    """Somebody else may write to it, another machine perhaps. Else QEMU refuses a disk that another QEMU has."""
    discard: bool = False
    """Give the host back what the guest discards."""


@dataclass(frozen=True, kw_only=True)
class QmpTimeouts:
    """How patient we are with QEMU's monitor. The defaults of the handshake are Kata's."""

    read_timeout_s: float = 0.25
    """Limit of one attempt: connect, greeting, `qmp_capabilities`, its answer."""
    connect_timeout_s: float = 5.0
    """Limit of all attempts together."""
    retry_pause_s: float = 0.05
    command_timeout_s: float = 5.0
    """Limit of any later command's answer."""


@dataclass(frozen=True, kw_only=True)
class VmSpec:
    """One virtual machine. `hypervisor.qemu.machine.booted()` makes it run."""

    name: str
    """Shown in the process list as `-name`, for example `sandbox-<id>`."""
    run_dir: Path
    """Sockets and the console log live here. Created with mode 0700 when missing; the caller removes it."""
    qemu_path: Path
    kernel: Path
    initrd: Path | None = None
    image: Path | None = None
    image_initrd: Path | None = None
    rootfs_type: RootfsType = "ext4"
    """File system on the first partition of `image`; unused with `initrd`."""
    rootfs_driver: RootfsDriver = "virtio-blk"
    image_bytes: int = 0
    """Size of `image`; needed only for an nvdimm."""
    verity: Verity | None = None
    """What the kernel checks the first partition of `image` with; the second has the hashes."""
    firmware: Path | None = None
    pflash: tuple[Path, ...] = ()
    """Firmware as flash memory: its code, which is read-only, then its variables, whose changes are lost."""
    kernel_params: str = ""
    """Words for the kernel, space separated; they replace our words of the same key (see
    `qemu/kernel_words.py`).
    """

    protection: Protection | None = None
    """What hides the guest's memory from the host; None for an ordinary guest."""
    initdata: Path | None = None
    """A disk image with the guest's initial data, attached read-only."""

    arch: str = "x86_64"
    """The guest's architecture as `uname -m` says it; see `hypervisor.arch`."""
    accel: Accel = "tcg"
    machine_type: str = ""
    machine_accelerators: str = ""
    """More `-machine` properties, comma separated (Kata's name for them)."""
    cpu_model: str = ""
    cpu_features: str = ""
    """Appended to the `-cpu` model, comma separated."""
    tsc_khz: int | None = None
    """The host's TSC frequency (`hypervisor.host.Host.tsc_khz`); with TCG it spares the guest kernel its
    calibration.
    """
    tcg_tb_mib: int = 64
    """Buffer for translated code under TCG. Memory is used only as it fills: a boot and a Python program in
    the guest fill about 40 MiB, and half of that is too small for more than one program at a time. QEMU's own
    default is 1 GiB, which a busy guest fills in the end.
    """

    vcpus: int = 1
    max_vcpus: int = 0
    """How many processors there may be later; of use only when greater than `vcpus`."""
    memory_mib: int = 256
    memory_slots: int = 0
    max_memory_mib: int = 0
    """Limit for hotplug; slots and limit are written only when both allow more than `memory_mib`."""
    memory_prealloc: bool = False
    hugepages: bool = False
    memory_dir: Path | None = None
    """Directory for a file that is the guest's memory; QEMU makes it without a name."""
    numa: tuple[NumaNode, ...] = ()
    """What memory and processors are divided into, evenly; empty is a guest that knows of no nodes."""

    shares: tuple[Share, ...] = ()
    exports: tuple[Export, ...] = ()
    vsock: VsockKind | None = "user"
    """None leaves the device out: the machine then cannot be talked to (tests only)."""
    log_vport: int | None = None
    """vsock port of the agent's log stream; Kata uses 1025 when the hypervisor's debug switch is on."""
    ready_vport: int | None = None
    """vsock port of the host that our agent calls when it is ready; a stock agent ignores the word."""
    netns: Path | None = None
    """Network namespace QEMU runs in."""
    user: User | None = None
    """Whom QEMU runs as; None is our own user."""
    selinux_label: str = ""
    """What QEMU runs under; empty is what the host's policy gives it."""
    nics: tuple[Nic, ...] = ()
    nic_ports: int = 0
    """Free ports for network interfaces that are plugged in later; s390x needs none, and has as many as here."""
    iommu: bool = False
    iommu_platform: bool = False
    """Virtio devices on channels (s390x) go through the platform's IOMMU, as protected guests need it."""
    nested_virtualization: bool = True
    """Let the guest see what it would need to run virtual machines itself, where the processor model has it."""
    iothread: bool = False
    """Let the root disk, and the SCSI controller, have a thread of their own."""
    disk_aio: BlockAio | None = None
    """How QEMU reads the images of virtio disks; None, here and in the next four, is QEMU's own way."""
    disk_cache_direct: bool | None = None
    """Go past the host's page cache, as "native" needs it."""
    disk_cache_no_flush: bool | None = None
    disk_queue_size: int | None = None
    """A power of two, 4 to 1024."""
    disk_queues: int | None = None
    disk_logical_sector_bytes: int | None = None
    """Of disks that are plugged in later: a power of two, 512 to 65536; None, here and in the next, is QEMU's own."""
    disk_physical_sector_bytes: int | None = None
    extensions: tuple[Extension, ...] = ()
    disk_places: bool = False
    """Room for virtio disks that are plugged in later."""
    vhost_user_reconnect_s: int = 0
    """Pause before QEMU connects again to a program that serves a disk and has gone away; 0 is never."""
    scsi: bool = False
    """A SCSI controller, which disks that are plugged in later belong to."""
    spare_iothreads: int = 0
    """Threads for virtio disks that are plugged in later."""
    virtio_mem: bool = False
    """A device that memory can be added through later, as much as `max_memory_mib` allows."""
    balloon: bool = False
    """Take memory back from the guest that it has freed."""
    entropy_source: Path | None = None
    """A file of the host that feeds a random number device; None leaves the guest to its processor."""
    pcie_root_ports: int = 0
    """Spare ports for devices added later."""
    pcie_switch_ports: int = 0
    """Spare ports of one switch; not together with `pcie_root_ports`."""
    host_devices: tuple[HostDevice, ...] = ()
    """Devices of the host that the guest has from its start. Those of PCI take the first of the ports for them."""
    host_device_port: PortKind = "root-port"
    """What PCI devices of the host are behind: spare ports of this kind, of which there are as many as they need."""
    host_device_places: int = 0
    """How many more there have to be, for devices that are plugged in later."""
    extra_monitor: ExtraMonitor | None = None
    """A second monitor for people, on `extra-monitor.sock` in the run directory."""
    seccomp_sandbox: str = ""
    """Value of QEMU's `-sandbox`; empty leaves it out."""
    dump_dir: Path | None = None
    """Where memory goes when the guest's kernel gives up. The directory is made when that happens."""
    dump_paging: bool = False
    """Whether such a dump has the guest's virtual addresses beside the physical ones."""
    debug: bool = False
    """Let the guest kernel talk on the console."""
    qmp: QmpTimeouts = field(default_factory=QmpTimeouts)

    @property
    def parks_vcpus(self) -> bool:
        """Whether all processors that there may be are there from the start, and the guest begins with `vcpus` of them.

        An emulator's threads share one buffer for translated code. QEMU ends itself when a processor comes while all of
        the buffer is in somebody's hands, which the boot leads to, and also when one comes after another has gone.
        """
        return self.accel == "tcg" and self.max_vcpus > self.vcpus and self.protection is None

"""What a virtual machine is to be: plain frozen data, decided by the caller.

Everything that needs a decision (which accelerator, which vsock transport, how much memory) has been decided
when a `VmSpec` exists; `hypervisor.accel` helps with the decisions that depend on the host. Nothing here
touches the host.

Choices of shape:

- Empty text means "the default of the architecture" (`machine_type`, `cpu_model`), so a configuration file
  can be handed through as it is.
- Sizes are integers in MiB, times are seconds; both are in the name.
- Guest memory is always a shared memfd: vhost-user devices (virtiofs, our vsock device) map it. No field for
  it.
- Either `initrd` or `image` holds the guest's root file system. An image is attached as a read-only virtio
  disk and its first partition is mounted by the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Accel = Literal["kvm", "tcg"]
VsockKind = Literal["user", "vhost"]
VirtioFsCache = Literal["never", "auto", "always", "metadata"]
RootfsType = Literal["ext4", "xfs", "erofs"]


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
    extra_args: tuple[str, ...] = ()
    """Kata's `virtio_fs_extra_args`, in the spelling of either daemon."""


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
    rootfs_type: RootfsType = "ext4"
    """File system on the first partition of `image`; unused with `initrd`."""
    firmware: Path | None = None
    kernel_params: str = ""
    """Words for the kernel, space separated; they replace our words of the same key (see
    `qemu/kernel_words.py`).
    """

    arch: str = "x86_64"
    """The guest's architecture as `uname -m` says it; a key of `hypervisor.arch.ARCHES`."""
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
    """Limit for hotplug; written only when greater than `vcpus`."""
    memory_mib: int = 256
    memory_slots: int = 0
    max_memory_mib: int = 0
    """Limit for hotplug; slots and limit are written only when both allow more than `memory_mib`."""
    memory_prealloc: bool = False
    hugepages: bool = False

    shares: tuple[Share, ...] = ()
    vsock: VsockKind | None = "user"
    """None leaves the device out: the machine then cannot be talked to (tests only)."""
    log_vport: int | None = None
    """vsock port of the agent's log stream; Kata uses 1025 when the hypervisor's debug switch is on."""
    ready_vport: int | None = None
    """vsock port of the host that our agent calls when it is ready; a stock agent ignores the word."""
    netns: Path | None = None
    """Network namespace QEMU runs in."""
    seccomp_sandbox: str = ""
    """Value of QEMU's `-sandbox`; empty leaves it out."""
    debug: bool = False
    """Let the guest kernel talk on the console."""
    qmp: QmpTimeouts = field(default_factory=QmpTimeouts)

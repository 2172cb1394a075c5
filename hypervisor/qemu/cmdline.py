"""From a `VmSpec` to QEMU's argument list, without touching the host.

Order of the arguments, fixed so that golden files and people can compare them:

1. name, kernel, initrd, kernel command line
2. processors, machine, accelerator, processor model, memory and its backend, or those of its NUMA nodes
3. the monitors, then devices: IOMMU, console, root disk, vsock, shares and network interfaces in the order of
   the specification, initial data, places for disks, a confidential guest's protection with its firmware, spare ports,
   devices of the host, the panic device
4. sandbox, firmware, the fixed rest

On a PCI machine devices get their slots in that order too: the guest sees them in the same places each time.
Every device costs the guest boot time, so there is nothing that the specification does not ask for: no
bridges, no controllers. What few specifications ask for is loaded when one does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from hypervisor.arch import Arch, arch_named
from hypervisor.errors import InvalidSpec
from hypervisor.qemu import args
from hypervisor.qemu.kernel_words import kernel_command_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hypervisor.qemu.nic import NicFds
    from hypervisor.spec import VmSpec

_MEMORY_ID = "mem"
_INITDATA_SET = 1
_MIB = 2**20
_MIB_PER_GIB = 1024
# Types of objects and devices that not every QEMU has, and what to do about it: a QEMU that shall have one is asked
# before it is started.
RARE_TYPES = MappingProxyType(
    {
        "iommufd": "install QEMU 9.0 or later, or name one as path",
        "s390-pv-guest": "install a QEMU that was built for a host with s390x",
        "sev-snp-guest": "install QEMU 9.1 or later, or name one as path",
        "tdx-guest": "install QEMU 10.1 or later, or name one as path",
        "virtio-mem-ccw": "install QEMU 10.0 or later, or name one as path",
    }
)
# Properties that few QEMUs have, by device and name. No release of QEMU itself has this one: it is in the branch that
# virtiofs was developed in.
_NO_DAX = "set virtio_fs_cache_size to 0; virtio_fs_cache decides what is cached"
RARE_PROPERTIES = MappingProxyType(
    {
        ("vhost-user-fs-ccw", "cache-size"): _NO_DAX,
        ("vhost-user-fs-pci", "cache-size"): _NO_DAX,
    }
)


@dataclass(frozen=True, kw_only=True)
class Fds:
    """File descriptors that QEMU inherits under these numbers."""

    qmp: int
    """A listening Unix socket."""
    console: int
    """A connected stream socket."""
    vsock: int | None = None
    """For "user" a connected Unix socket that speaks vhost-user, for "vhost" an open /dev/vhost-vsock."""
    guest_cid: int | None = None
    """The guest's address, with "vhost"; our own device tells it to the guest itself."""
    shares: tuple[int, ...] = ()
    """Connected Unix sockets to virtiofsd, one per share and in their order."""
    initdata: int | None = None
    """The image with initial data, open for reading: its folder is closed to a QEMU that is not root."""
    nics: tuple[NicFds, ...] = ()
    """Taps, one entry per network interface and in their order."""
    iommufd: int | None = None
    """An open /dev/iommu, when a device of the host has a file of its own."""
    host_devices: tuple[int | None, ...] = ()
    """Own files of the host's devices, one entry for each and in their order; None where QEMU opens the group."""

    def all(self) -> list[int]:
        maybe = (fd for fd in (self.vsock, self.initdata, self.iommufd, *self.host_devices) if fd is not None)
        nics = (fd for nic in self.nics for fd in (*nic.tap, *nic.vhost))
        return [self.qmp, self.console, *maybe, *self.shares, *nics]


def build_cmdline(spec: VmSpec, fds: Fds) -> list[str]:
    """QEMU's argument list, program first. Raises InvalidSpec for values that have no safe form in it."""
    arch = arch_named(spec.arch)
    switches: list[args.Switch] = [
        *_software(spec, arch),
        *_machine(spec, arch),
        *_monitors(spec, fds),
        *_iommu(spec, arch),
        *_console(arch, fds),
        *_root_disk(spec, arch),
        *_vsock(spec, arch, fds),
        *_shares(spec, arch, fds),
        *_exports(spec, arch),
        *_nics(spec, arch, fds),
        *_initdata(spec, arch, fds),
        *_extras(spec, arch),
        *_disk_places(spec, arch),
        *_protection(spec),
        *_spare_ports(spec, arch),
        *_host_devices(spec, arch, fds),
        *_panic_device(spec, arch),
    ]
    if spec.iommu_platform:
        from hypervisor.qemu.extras import behind_iommu_platform

        switches = behind_iommu_platform(switches, arch)
    if spec.seccomp_sandbox:
        switches.append(args.Sandbox(spec.seccomp_sandbox))
    if spec.protection is None:
        switches.extend(_firmware(spec))
    switches.append(args.Fixed())
    return [str(spec.qemu_path), *(word for switch in switches for word in switch.argv())]


def types_in(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each switch of a command line that names a type (a device's, an object's or the machine's), and the type."""
    for switch, value in pairwise(argv):
        if switch in ("-device", "-object") and value.startswith("{"):
            words = json.loads(value)
            yield switch, words.get("driver") or words["qom-type"]
        elif switch in ("-device", "-object", "-machine"):
            yield switch, value.partition(",")[0]


def is_rare(argv: Sequence[str]) -> bool:
    """Whether a command line has something that not every QEMU has."""
    return any(name in RARE_TYPES for _, name in types_in(argv)) or any(rare_properties_in(argv))


def rare_properties_in(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Those of `RARE_PROPERTIES` that a command line gives to a device."""
    for switch, value in pairwise(argv):
        if switch == "-device":
            driver, *words = value.replace(",,", "").split(",")
            names = {word.partition("=")[0] for word in words}
            yield from (rare for rare in RARE_PROPERTIES if rare[0] == driver and rare[1] in names)


def _software(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.initrd is not None and spec.image is not None:
        raise InvalidSpec("a machine has an initrd or an image, not both")
    if spec.image_initrd is not None and spec.image is None:
        raise InvalidSpec("image_initrd mounts an image, and the guest has none; set image")
    yield args.Name(spec.name)
    yield args.Kernel(spec.kernel)
    initrd = spec.initrd or spec.image_initrd
    if initrd is not None:
        yield args.Initrd(initrd)
    yield args.Append(kernel_command_line(spec, arch))


def _machine(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    grows = spec.max_vcpus > spec.vcpus and spec.protection is None
    processors = spec.max_vcpus if grows else spec.vcpus
    yield args.Smp(
        cpus=processors if spec.parks_vcpus else spec.vcpus,
        sockets=processors if spec.numa else None,
        maxcpus=processors if grows and not spec.parks_vcpus else None,
    )
    machine = spec.machine_type or arch.machine
    props = arch.machine_props[spec.accel] if machine == arch.machine else ""
    yield args.Machine(
        type=machine,
        raw=_machine_props(props, _possible(spec, arch)),
        memory_backend=_MEMORY_ID if not spec.numa else None,
        nvdimm=True if spec.rootfs_driver == "nvdimm" else None,
        confidential_guest_support=spec.protection.id if spec.protection is not None else None,
    )
    yield args.Accelerator(
        accel=spec.accel,
        tb_size=spec.tcg_tb_mib if spec.accel == "tcg" else None,
        kernel_irqchip="split" if _needs_split_irqchip(spec, arch) else None,
    )
    cpu = arch.cpu[spec.accel]
    hidden = "" if spec.nested_virtualization else arch.no_nested_virtualization
    if model := spec.cpu_model or (spec.protection.cpu_model if spec.protection is not None else ""):
        yield args.Cpu(model=model, raw=_comma_joined(hidden, spec.cpu_features))
    else:
        yield args.Cpu(model=cpu.model, raw=_comma_joined(cpu.features, hidden, spec.cpu_features))
    yield _memory(spec)
    if spec.numa:
        from hypervisor.qemu import numa

        yield from numa.switches(spec, arch, processors, partial(_memory_backend, spec))
    else:
        yield _memory_backend(spec, _MEMORY_ID, _size(spec.memory_mib))


def _memory(spec: VmSpec) -> args.Memory:
    """How much the guest boots with, and the address space for more."""
    size, slots, limit = _size(spec.memory_mib), 0, spec.memory_mib
    if spec.protection is not None:
        return args.Memory(size=size)
    if spec.memory_slots > 0 and spec.max_memory_mib > spec.memory_mib:
        slots, limit = spec.memory_slots, spec.max_memory_mib
    if spec.rootfs_driver == "nvdimm":
        slots += 1
        limit += -(-spec.image_bytes // _MIB)
    return args.Memory(
        size=size, slots=slots or None, maxmem=_size(limit) if limit > spec.memory_mib else None
    )


def _memory_backend(spec: VmSpec, name: str, size: str) -> args.Switch:
    if spec.protection is not None:
        from hypervisor.qemu.confidential import MemoryBackendRam

        return MemoryBackendRam(id=name, size=size, prealloc=spec.memory_prealloc or None)
    if spec.memory_dir is not None:
        from hypervisor.qemu.memory import in_directory

        return in_directory(spec, spec.memory_dir, name, size)
    return args.MemoryBackendMemfd(
        id=name,
        size=size,
        prealloc=spec.memory_prealloc or None,
        hugetlb=spec.hugepages or None,
    )


def _needs_split_irqchip(spec: VmSpec, arch: Arch) -> bool:
    """Whether KVM has to leave to QEMU the part of the interrupt controller where an emulated IOMMU remaps, or which a
    protected guest does not let KVM have.
    """
    if spec.protection is not None and spec.protection.split_irqchip:
        return True
    return spec.accel == "kvm" and spec.iommu and arch.iommu is not None and arch.iommu.device is not None


def _possible(spec: VmSpec, arch: Arch) -> str:
    """The configured properties, without those that need KVM when there is none."""
    if spec.accel == "kvm":
        return spec.machine_accelerators
    words = spec.machine_accelerators.split(",")
    return ",".join(word for word in words if word not in arch.kvm_only_machine_props)


def _machine_props(ours: str, configured: str) -> str:
    """Ours, unless configured the same or otherwise, and then the configured ones."""
    keys = {word.partition("=")[0] for word in configured.split(",")}
    kept = (word for word in ours.split(",") if word.partition("=")[0] not in keys)
    return _comma_joined(*kept, configured)


def _monitors(spec: VmSpec, fds: Fds) -> Iterator[args.Switch]:
    yield args.ChardevSocket(id="qmp", fd=fds.qmp, server=True, wait=False)
    yield args.Mon(chardev="qmp")
    if spec.extra_monitor is not None:
        from hypervisor.qemu.options import extra_monitor

        yield from extra_monitor(spec.extra_monitor, spec.run_dir)


def _iommu(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.iommu:
        from hypervisor.qemu.options import iommu

        yield from iommu(arch)


def _spare_ports(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.pcie_root_ports or spec.pcie_switch_ports or spec.host_devices or spec.host_device_places:
        from hypervisor.qemu.ports import spare_ports

        yield from spare_ports(spec, arch)


def _host_devices(spec: VmSpec, arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    if spec.host_devices:
        from hypervisor.qemu.vfio import switches

        yield from switches(spec, arch, fds.iommufd, fds.host_devices)


def _panic_device(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.dump_dir is not None:
        from hypervisor.qemu.options import panic_device

        yield from panic_device(arch)


def _firmware(spec: VmSpec) -> Iterator[args.Switch]:
    if spec.firmware is not None and spec.pflash:
        raise InvalidSpec("firmware is a file or flash memory, not both; remove firmware or pflashes")
    if spec.firmware is not None:
        yield args.Bios(spec.firmware)
    if spec.pflash:
        from hypervisor.qemu.rare_args import Pflash, VolatilePflash

        for index, image in enumerate(spec.pflash):
            yield VolatilePflash(image) if index else Pflash(image)


def _console(arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    yield args.ChardevSocket(id="console", fd=fds.console)
    if arch.devices.console is None:
        yield args.Serial("console")
    else:
        yield args.SerialDevice(driver=arch.devices.console, chardev="console")


def _root_disk(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.image is None:
        return
    if spec.rootfs_driver == "nvdimm":
        from hypervisor.qemu.memory import image

        yield from image(spec, arch)
        return
    if spec.iothread:
        from hypervisor.qemu.rare_args import IoThread

        yield IoThread(id="rootfs-io")
    yield from virtio_disk(spec, arch, "rootfs", spec.image, iothread="rootfs-io" if spec.iothread else None)


def virtio_disk(
    spec: VmSpec,
    arch: Arch,
    node: str,
    image: Path,
    *,
    iothread: str | None = None,
    serial: str | None = None,
) -> Iterator[args.Switch]:
    """A read-only disk; a node's name has at most 31 characters."""
    yield args.BlockdevFile(
        node_name=node,
        filename=image,
        aio=spec.disk_aio,
        cache__direct=spec.disk_cache_direct,
        cache__no_flush=spec.disk_cache_no_flush,
    )
    yield args.VirtioBlk(
        driver=arch.devices.block,
        drive=node,
        iothread=iothread,
        serial=serial,
        queue_size=spec.disk_queue_size,
        num_queues=spec.disk_queues,
    )


def _vsock(spec: VmSpec, arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    if spec.vsock == "user":
        if fds.vsock is None:
            raise InvalidSpec("the vsock device needs a connected socket")
        yield args.ChardevSocket(id="vsock", fd=fds.vsock)
        yield args.VhostUserVsock(driver=arch.devices.user_vsock, chardev="vsock")
    elif spec.vsock == "vhost":
        if fds.vsock is None or fds.guest_cid is None:
            raise InvalidSpec("the vsock device needs an open /dev/vhost-vsock and a guest address")
        yield args.VhostVsock(driver=arch.devices.vhost_vsock, vhostfd=fds.vsock, guest_cid=fds.guest_cid)


def _shares(spec: VmSpec, arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    for index, (share, fd) in enumerate(zip(spec.shares, fds.shares, strict=True)):
        chardev = f"fs{index}"
        yield args.ChardevSocket(id=chardev, fd=fd)
        yield args.VhostUserFs(
            driver=arch.devices.fs,
            chardev=chardev,
            tag=share.tag,
            queue_size=share.queue_size,
            cache_size=_size(share.dax_mib) if share.dax_mib else None,
        )


def _nics(spec: VmSpec, arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    if spec.nics or spec.nic_ports:
        from hypervisor.qemu.nic import switches

        yield from switches(spec, fds.nics, arch)


def _initdata(spec: VmSpec, arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    """Read once, and in a folder where not every kind of I/O is possible: options of disks are not for it."""
    if spec.initdata is not None:
        from hypervisor.qemu.rare_args import AddFd

        if fds.initdata is None:
            raise InvalidSpec("initial data need an open file")
        yield AddFd(fd=fds.initdata, set=_INITDATA_SET)
        yield args.BlockdevFile(node_name="initdata", filename=f"/dev/fdset/{_INITDATA_SET}")
        yield args.VirtioBlk(driver=arch.devices.block, drive="initdata")


def _extras(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if any(
        (spec.extensions, spec.scsi, spec.spare_iothreads, spec.virtio_mem, spec.balloon, spec.entropy_source)
    ):
        from hypervisor.qemu.extras import extras

        yield from extras(spec, arch)


def _disk_places(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.disk_places:
        from hypervisor.qemu.disk_places import disk_places

        yield from disk_places(arch)


def _protection(spec: VmSpec) -> Iterator[args.Switch]:
    if spec.protection is not None:
        from hypervisor.qemu.confidential import protection

        yield from protection(spec, spec.protection)


def _exports(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.exports:
        from hypervisor.qemu.options import exports

        yield from exports(spec, arch)


def _size(mib: int) -> str:
    return f"{mib}M" if mib % _MIB_PER_GIB else f"{mib // _MIB_PER_GIB}G"


def _comma_joined(*parts: str) -> str:
    return ",".join(part for part in parts if part)

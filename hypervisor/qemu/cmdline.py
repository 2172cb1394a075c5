"""From a `VmSpec` to QEMU's argument list, without touching the host.

Order of the arguments, fixed so that golden files and people can compare them:

1. name, kernel, initrd, kernel command line
2. processors, machine, accelerator, processor model, memory and its backend
3. the monitor, then devices: console, root disk, vsock, shares in the order of the specification
4. sandbox, firmware, the fixed rest

On a PCI machine devices get their slots in that order too: the guest sees them in the same places each time.
Every device costs the guest boot time, so there is nothing the guest does not use: no random number device
(both `host` and the default TCG model have RDRAND), no bridges, no controllers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.arch import Arch, arch_named
from hypervisor.errors import InvalidSpec
from hypervisor.qemu import args
from hypervisor.qemu.kernel_words import kernel_command_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.spec import VmSpec

_MEMORY_ID = "mem"
_MIB_PER_GIB = 1024


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

    def all(self) -> list[int]:
        return [self.qmp, self.console, *([] if self.vsock is None else [self.vsock]), *self.shares]


def build_cmdline(spec: VmSpec, fds: Fds) -> list[str]:
    """QEMU's argument list, program first. Raises InvalidSpec for values that have no safe form in it."""
    arch = arch_named(spec.arch)
    switches = [
        *_software(spec, arch),
        *_machine(spec, arch),
        *_monitor(fds),
        *_console(arch, fds),
        *_root_disk(spec, arch),
        *_vsock(spec, arch, fds),
        *_shares(spec, arch, fds),
    ]
    if spec.seccomp_sandbox:
        switches.append(args.Sandbox(spec.seccomp_sandbox))
    if spec.firmware is not None:
        switches.append(args.Bios(spec.firmware))
    switches.append(args.Fixed())
    return [str(spec.qemu_path), *(word for switch in switches for word in switch.argv())]


def _software(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.initrd is not None and spec.image is not None:
        raise InvalidSpec("a machine has an initrd or an image, not both")
    yield args.Name(spec.name)
    yield args.Kernel(spec.kernel)
    if spec.initrd is not None:
        yield args.Initrd(spec.initrd)
    yield args.Append(kernel_command_line(spec, arch))


def _machine(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    yield args.Smp(cpus=spec.vcpus, maxcpus=spec.max_vcpus if spec.max_vcpus > spec.vcpus else None)
    machine = spec.machine_type or arch.machine
    props = arch.machine_props[spec.accel] if machine == arch.machine else ""
    yield args.Machine(
        type=machine, raw=_comma_joined(props, spec.machine_accelerators), memory_backend=_MEMORY_ID
    )
    yield args.Accelerator(accel=spec.accel, tb_size=spec.tcg_tb_mib if spec.accel == "tcg" else None)
    cpu = arch.cpu[spec.accel]
    if spec.cpu_model:
        yield args.Cpu(model=spec.cpu_model, raw=spec.cpu_features)
    else:
        yield args.Cpu(model=cpu.model, raw=_comma_joined(cpu.features, spec.cpu_features))
    yield from _memory(spec)


def _memory(spec: VmSpec) -> Iterator[args.Switch]:
    size = _size(spec.memory_mib)
    grows = spec.memory_slots > 0 and spec.max_memory_mib > spec.memory_mib
    yield args.Memory(
        size=size,
        slots=spec.memory_slots if grows else None,
        maxmem=_size(spec.max_memory_mib) if grows else None,
    )
    yield args.MemoryBackendMemfd(
        id=_MEMORY_ID,
        size=size,
        prealloc=spec.memory_prealloc or None,
        hugetlb=spec.hugepages or None,
    )


def _monitor(fds: Fds) -> Iterator[args.Switch]:
    yield args.ChardevSocket(id="qmp", fd=fds.qmp, server=True, wait=False)
    yield args.Mon(chardev="qmp")


def _console(arch: Arch, fds: Fds) -> Iterator[args.Switch]:
    yield args.ChardevSocket(id="console", fd=fds.console)
    if arch.devices.console is None:
        yield args.Serial("console")
    else:
        yield args.SerialDevice(driver=arch.devices.console, chardev="console")


def _root_disk(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    if spec.image is not None:
        yield args.BlockdevFile(node_name="rootfs", filename=spec.image)
        yield args.VirtioBlk(driver=arch.devices.block, drive="rootfs")


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
            driver=arch.devices.fs, chardev=chardev, tag=share.tag, queue_size=share.queue_size
        )


def _size(mib: int) -> str:
    return f"{mib}M" if mib % _MIB_PER_GIB else f"{mib // _MIB_PER_GIB}G"


def _comma_joined(*parts: str) -> str:
    return ",".join(part for part in parts if part)

"""What a confidential guest cannot have, and what it cannot be without, as far as no host has to be asked.

Where a key asks for something that hidden memory does not allow but the guest can do without, it is turned off, and a
remark says so. Where the guest would not start, or would not be protected, it is a problem.
"""

import base64
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from config.describe import show
from config.schema import Qemu
from config.schema.hypervisor import FIRMWARE_HINT, SEALED_MACHINE

_ID_BLOCK_BYTES = 96
_ID_AUTH_BYTES = 4096
_POLICY_BITS = 64
# Reserved by the processor's firmware: it starts no guest without it.
_POLICY_ALWAYS = 1 << 17


class Remark(NamedTuple):
    """What is said about a key, without its section."""

    key: str
    text: str
    hint: str = ""


def without(qemu: Qemu) -> tuple[Qemu, list[Remark]]:
    """The same guest without what a confidential one cannot have, and a remark for each thing that it loses."""
    if not qemu.confidential_guest:
        return qemu, []
    off: dict[str, Any] = {}
    remarks = []
    for key, value, why in (
        ("shared_fs", "none", "its memory is closed to virtiofsd"),
        ("enable_hugepages", False, "hidden memory is QEMU's own"),
        ("file_mem_backend", "", "hidden memory is QEMU's own"),
        ("enable_vhost_user_store", False, "its memory is closed to other programs"),
        ("enable_guest_swap", False, "the host could read what it swaps out"),
        ("enable_virtio_mem", False, "memory cannot be added to it"),
        ("reclaim_guest_freed_memory", False, "the host cannot take its memory back"),
        ("guest_memory_dump_path", "", "the host cannot read its memory"),
        ("hot_plug_vfio", "no-port", "it takes only the devices that it starts with"),
        ("hotplug_vfio_on_root_bus", False, "it takes only the devices that it starts with"),
        ("entropy_source", "/dev/urandom", "the host would know its random numbers"),
    ):
        if getattr(qemu, key) not in (value, ""):
            off[key] = value
            remarks.append(_turned_off(key, why, f"set it to {show(value)}"))
    if qemu.image and qemu.vm_rootfs_driver == "virtio-pmem" and not qemu.disable_image_nvdimm:
        off["disable_image_nvdimm"] = True
        remarks.append(
            _turned_off(
                "vm_rootfs_driver", "an nvdimm is memory of the host; image is a virtio disk", "set another"
            )
        )
    for key, most, boot in (
        ("default_maxvcpus", qemu.default_maxvcpus, _whole(qemu.default_vcpus)),
        ("default_maxmemory", qemu.default_maxmemory, qemu.default_memory or 128),
    ):
        # 0 is all of the host's. A limit below what is wanted at boot stays one.
        off[key] = min(filter(None, (boot, most)), default=0)
        if most > boot > 0:
            remarks.append(_turned_off(key, f"it keeps the {boot} that it starts with", "set it to 0"))
    return replace(qemu, **off), remarks


def problems(qemu: Qemu) -> Iterator[Remark]:
    """What keeps such a guest from starting, and keys that are of no use without it."""
    yield from _snp(qemu)
    if not qemu.confidential_guest:
        return
    if qemu.machine_type == "virt":
        yield Remark(
            "machine_type", "arm64 guests cannot be confidential", f'use "q35" or "{SEALED_MACHINE}"'
        )
    if qemu.accel == "tcg":
        yield Remark("accel", "a confidential guest needs KVM, and tcg emulates it", 'use "auto" or "kvm"')
    if qemu.vsock == "user":
        yield Remark(
            "vsock",
            "the shim's own device would have to map a confidential guest's memory",
            'use "auto" or "vhost"',
        )
    if qemu.machine_type == "q35" and not qemu.firmware:
        yield Remark("firmware", "a confidential guest starts from firmware made for it", FIRMWARE_HINT)
    for key in ("firmware_volume", "pflashes"):
        if getattr(qemu, key):
            yield Remark(
                key, "a confidential guest has no flash memory", "name the firmware's file as firmware"
            )
    if qemu.machine_type == SEALED_MACHINE:
        for key in ("image", "initrd"):
            if getattr(qemu, key):
                problem = "a guest with Secure Execution has its root file system inside kernel"
                yield Remark(key, problem, "remove it")


def _snp(qemu: Qemu) -> Iterator[Remark]:
    if qemu.sev_snp_guest and not qemu.confidential_guest:
        yield Remark(
            "sev_snp_guest", "protects nothing without confidential_guest", "set confidential_guest = true"
        )
    if qemu.sev_snp_guest and qemu.machine_type != "q35":
        yield Remark(
            "sev_snp_guest", f"{qemu.machine_type} guests have no SEV-SNP", 'set machine_type = "q35"'
        )
    for key, other, size in (
        ("snp_id_block", "snp_id_auth", _ID_BLOCK_BYTES),
        ("snp_id_auth", "snp_id_block", _ID_AUTH_BYTES),
    ):
        value = getattr(qemu, key)
        if value and not qemu.sev_snp_guest:
            yield Remark(key, "is of use only with sev_snp_guest", "set sev_snp_guest = true, or remove it")
        elif value and not getattr(qemu, other):
            yield Remark(key, f"is of use only together with {other}", "set both or none")
        elif value and _decoded_size(value) != size:
            yield Remark(key, f"want base64 of {size} bytes, got {_described(value)}")
    policy = qemu.snp_guest_policy
    if policy >> _POLICY_BITS or not policy & _POLICY_ALWAYS:
        problem = (
            f"want up to {_POLICY_BITS} bits, of which {_POLICY_ALWAYS:#x} is always set, got {show(policy)}"
        )
        yield Remark("snp_guest_policy", problem, f"for example {0x30000} ({0x30000:#x})")


def _turned_off(key: str, why: str, hint: str) -> Remark:
    return Remark(key, f"turned off for a confidential guest: {why}", hint)


def _whole(vcpus: float) -> int:
    """The processors that QEMU is told of; 0, all that there are, for numbers that mean that."""
    return math.ceil(vcpus or 1) if math.isfinite(vcpus) and vcpus >= 0 else 0


def _decoded_size(text: str) -> int | None:
    try:
        return len(base64.b64decode(text, validate=True))
    except ValueError:
        return None


def _described(text: str) -> str:
    size = _decoded_size(text)
    return show(text) if size is None else f"{size} bytes"

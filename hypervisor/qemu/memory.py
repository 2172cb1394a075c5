"""Guest memory that is not an anonymous one: a file in a directory, and the image of the root file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.rare_args import MemoryBackendFile, Nvdimm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.spec import VmSpec

# An nvdimm gets whole pages of the guest.
_PAGE_BYTES = 4096


def in_directory(spec: VmSpec, directory: Path, name: str, size: str) -> args.Switch:
    """All memory of the guest as a file without a name."""
    if spec.hugepages:
        raise InvalidSpec(
            f"guest memory is a file in {directory} or huge pages, not both; "
            "remove file_mem_backend or enable_hugepages"
        )
    return MemoryBackendFile(
        id=name, mem_path=directory, size=size, share=True, prealloc=spec.memory_prealloc or None
    )


def image(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    """The root file system's image as persistent memory, shared by all guests that have it."""
    assert spec.image is not None
    if not arch.nvdimm:
        raise InvalidSpec(
            f"{arch.name} guests have no persistent memory; use {arch.devices.block} for {spec.image}"
        )
    if arch.nvdimm_by_firmware and spec.firmware is None and not spec.pflash:
        raise InvalidSpec(
            f"{arch.name} guests find persistent memory only through firmware; name its file as firmware, "
            f"or use {arch.devices.block} for {spec.image}"
        )
    if spec.image_bytes <= 0 or spec.image_bytes % _PAGE_BYTES:
        raise InvalidSpec(
            f"{spec.image} has {spec.image_bytes} bytes; persistent memory needs a multiple of {_PAGE_BYTES}: "
            "fill the image up, or attach it as a virtio disk"
        )
    yield MemoryBackendFile(
        id="rootfs",
        mem_path=spec.image,
        size=str(spec.image_bytes),
        share=False,
        prealloc=False,
        readonly=True,
    )
    yield Nvdimm(driver="nvdimm", memdev="rootfs")

"""How much memory a machine has room for beside what it is started with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypervisor.arch import Arch
    from hypervisor.spec import VmSpec

# Linux takes memory in blocks of this size, and every block size of virtio-mem divides it.
BLOCK_MIB = 128


def room_mib(spec: VmSpec, arch: Arch) -> int:
    """In whole blocks; nothing for guests whose memory is hidden from the host."""
    if spec.protection is not None or not (spec.virtio_mem or (arch.dimms and spec.memory_slots > 0)):
        return 0
    return max(0, (spec.max_memory_mib - spec.memory_mib) // BLOCK_MIB * BLOCK_MIB)

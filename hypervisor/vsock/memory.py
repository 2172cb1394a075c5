"""Guest memory as the VMM shares it: mapped files, addressed the guest's way or the VMM's way.

The guest names its buffers by guest-physical addresses; vhost-user names the rings by the VMM's own
virtual addresses. Both become memoryviews of a shared mapping here, checked against the table, so
nobody else in the package touches an address.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass

from hypervisor.vsock.errors import FrontEndViolation, GuestViolation

_ADDRESS_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """One row of the memory table as sent by the VMM; addresses and sizes in bytes."""

    guest_address: int
    bytes: int
    user_address: int
    mmap_offset: int


class _Region:
    """One mapped row of the table."""

    __slots__ = ("_mapping", "_whole", "size", "spec", "start", "view")

    def __init__(self, spec: RegionSpec, fd: int) -> None:
        if spec.bytes == 0 or max(spec.guest_address, spec.user_address) + spec.bytes > _ADDRESS_LIMIT:
            raise FrontEndViolation(f"memory region {spec} is empty or wraps around the address space")
        # Files on huge pages can be mapped from a multiple of their page size only.
        step = max(mmap.ALLOCATIONGRANULARITY, os.fstat(fd).st_blksize)
        head = spec.mmap_offset % step
        try:
            self._mapping = mmap.mmap(fd, head + spec.bytes, offset=spec.mmap_offset - head)
        except (OSError, ValueError, OverflowError) as err:
            raise FrontEndViolation(f"memory region {spec} cannot be mapped: {err}") from err
        self.spec = spec
        self.start = spec.guest_address
        self.size = spec.bytes
        self._whole = memoryview(self._mapping)
        self.view = self._whole[head:]

    def close(self) -> None:
        self.view.release()
        self._whole.release()
        # A view that is still alive, in the traceback of a violation say, takes the mapping with it later.
        with contextlib.suppress(BufferError):
            self._mapping.close()


class GuestMemory:
    """The memory table; `close()` releases every mapping and leaves an empty table.

    Views handed out must be dropped before the region they belong to is removed.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def __len__(self) -> int:
        return len(self._regions)

    def add(self, spec: RegionSpec, fd: int) -> None:
        """Map `spec` from `fd`, which stays the caller's. Raises FrontEndViolation."""
        for region in self._regions:
            if (
                spec.guest_address < region.start + region.size
                and region.start < spec.guest_address + spec.bytes
            ):
                raise FrontEndViolation(f"memory region {spec} overlaps {region.spec}")
        self._regions.append(_Region(spec, fd))
        # Nearly every buffer lies in the largest region: look there first.
        self._regions.sort(key=lambda region: -region.size)

    def remove(self, spec: RegionSpec) -> None:
        """Unmap the region with the addresses and size of `spec`. Raises FrontEndViolation if unknown."""
        for region in self._regions:
            known = region.spec
            if (known.guest_address, known.bytes, known.user_address) == (
                spec.guest_address,
                spec.bytes,
                spec.user_address,
            ):
                self._regions.remove(region)
                region.close()
                return
        raise FrontEndViolation(f"memory region {spec} is not in the table")

    def close(self) -> None:
        while self._regions:
            self._regions.pop().close()

    def collect(self, views: list[memoryview], address: int, length: int) -> None:
        """Append views of `length` bytes at guest-physical `address` to `views`.

        One view, or more where the range crosses from one region into its neighbour.
        Raises GuestViolation when any byte of the range is outside the table.
        """
        while length:
            for region in self._regions:
                offset = address - region.start
                if 0 <= offset < region.size:
                    part = min(length, region.size - offset)
                    views.append(region.view[offset : offset + part])
                    address += part
                    length -= part
                    break
            else:
                raise GuestViolation(f"buffer of {length} bytes at {address:#x} is outside guest memory")

    def at_user_address(self, address: int, length: int) -> memoryview | None:
        """`length` bytes at the VMM's virtual `address`, or None when they are not in one region."""
        for region in self._regions:
            offset = address - region.spec.user_address
            if offset >= 0 and offset + length <= region.size:
                return region.view[offset : offset + length]
        return None

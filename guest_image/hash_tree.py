"""dm-verity's tree of hashes, as the kernel wants it: format 1, SHA-256, blocks of 4096 bytes, no header in front.

Every block of the data has a hash, every block full of hashes has one, up to a single block whose hash is the root.
The program `veritysetup` makes the same; this is less than what it needs to be taken along.
Format: Documentation/admin-guide/device-mapper/verity.rst of the kernel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class HashTree:
    """The blocks of hashes, the topmost first, and what the kernel has to know to check with them."""

    blocks: bytes
    root_hash: str
    salt: str
    data_blocks: int

    def parameters(self) -> str:
        """The value of `kernel_verity_params`."""
        return (
            f"root_hash={self.root_hash},salt={self.salt},data_blocks={self.data_blocks},"
            f"data_block_size={BLOCK_BYTES},hash_block_size={BLOCK_BYTES}"
        )


def hash_tree(data: bytes, salt: bytes) -> HashTree:
    """The hashes of data that is a whole number of blocks, at least one."""
    levels: list[bytes] = []
    level = data
    while len(level) > BLOCK_BYTES:
        level = _padded(b"".join(_digests(level, salt)))
        levels.append(level)
    (root,) = _digests(level, salt)
    return HashTree(
        blocks=b"".join(reversed(levels)),
        root_hash=root.hex(),
        salt=salt.hex() or "-",
        data_blocks=len(data) // BLOCK_BYTES,
    )


def _digests(level: bytes, salt: bytes) -> Iterator[bytes]:
    view = memoryview(level)
    for start in range(0, len(view), BLOCK_BYTES):
        digest = hashlib.sha256(salt)
        digest.update(view[start : start + BLOCK_BYTES])
        yield digest.digest()


def _padded(hashes: bytes) -> bytes:
    return hashes + bytes(-len(hashes) % BLOCK_BYTES)

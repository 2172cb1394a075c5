"""dm-verity: the parameters with which the guest's kernel checks its root file system while reading it."""

from __future__ import annotations

from dataclasses import dataclass

from config import verity
from hypervisor.errors import InvalidSpec

_SECTOR_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Verity:
    """A tree of SHA-256 hashes as `veritysetup format` makes it; sizes in bytes."""

    root_hash: str
    salt: str
    """In hexadecimal digits; `-` for none."""
    data_blocks: int
    data_block_size: int
    hash_block_size: int

    @classmethod
    def parse(cls, text: str) -> Verity:
        """From the text of a configuration. Raises InvalidSpec, naming the part that is wrong."""
        try:
            words = verity.parse(text)
        except ValueError as err:
            raise InvalidSpec(f"kernel_verity_params: {err}") from None
        return cls(
            root_hash=words["root_hash"],
            salt=words["salt"],
            data_blocks=int(words["data_blocks"]),
            data_block_size=int(words["data_block_size"]),
            hash_block_size=int(words["hash_block_size"]),
        )

    def kernel_word(self, data: str, hashes: str) -> str:
        """The kernel's word that makes `/dev/dm-0` out of two devices, of the data and of its hashes."""
        sectors = self.data_blocks * self.data_block_size // _SECTOR_BYTES
        table = (
            f"0 {sectors} verity 1 {data} {hashes} {self.data_block_size} {self.hash_block_size} "
            f"{self.data_blocks} 0 sha256 {self.root_hash} {self.salt}"
        )
        return f'dm-mod.create="dm-verity,,,ro,{table}"'

"""dm-verity parameters: what is read, and what is refused by name."""

from __future__ import annotations

import pytest

from hypervisor.errors import InvalidSpec
from hypervisor.verity import Verity

HASH = "4f" * 32
TEXT = f"root_hash={HASH},salt=a0b1,data_blocks=8,data_block_size=4096,hash_block_size=1024"


def test_the_kernels_word() -> None:
    assert Verity.parse(TEXT).kernel_word("/dev/vda1", "/dev/vda2") == (
        'dm-mod.create="dm-verity,,,ro,0 64 verity 1 /dev/vda1 /dev/vda2 4096 1024 8 0 sha256 '
        + HASH
        + ' a0b1"'
    )


def test_the_order_does_not_matter() -> None:
    assert Verity.parse(", ".join(reversed(TEXT.split(",")))) == Verity.parse(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (",salt=a0b1", "", "salt is missing"),
        ("salt=", "pepper=", "'pepper' is not known"),
        (HASH, HASH[:-1], "root_hash is not the 64 hexadecimal digits"),
        (HASH, 'x" init=/bin/sh', "root_hash is not the 64"),
        ("a0b1", "a0b", "salt is not made of pairs"),
        ("a0b1", 'a0" init=/x', "salt is not made of pairs"),
        ("data_blocks=8", "data_blocks=0", "data_blocks is not a positive number"),
        ("data_blocks=8", "data_blocks=-8", "data_blocks is not a positive number"),
        ("data_block_size=4096", "data_block_size=1000", "data_block_size is none of 512, 1024, 2048, 4096"),
        ("hash_block_size=1024", "hash_block_size=", "hash_block_size is none of"),
        (TEXT, "", "'' is not known"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, problem: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Verity.parse(TEXT.replace(old, new))
    assert str(caught.value).startswith(f"kernel_verity_params: {problem}")
    assert "\n" not in str(caught.value)

"""Which modules the floor's guest loads, found in an initrd as the agent would find it."""

from __future__ import annotations

import pytest

from bench.errors import BenchError
from bench.floor import boot_modules
from guest_image.cpio import Tree

LIST = """\
vsock /m/vsock.ko
common /m/common.ko vsock
vmw_vsock_virtio_transport /m/transport.ko common virtio
virtio /m/virtio.ko
virtio_pci /m/pci.ko virtio builtin_one
overlay /m/overlay.ko
"""


def initrd(modules: str) -> bytes:
    tree = Tree()
    tree.file("/a", b"x" * 5)  # needs padding
    tree.file("/usr/lib/kata-py/modules", modules.encode())
    tree.file("/z", b"")
    return tree.to_cpio()


def test_needed_modules_come_first_and_once() -> None:
    assert boot_modules(initrd(LIST)) == [
        "/m/virtio.ko",
        "/m/pci.ko",
        "/m/vsock.ko",
        "/m/common.ko",
        "/m/transport.ko",
    ]


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (initrd("overlay /m/overlay.ko\n"), "built in"),
        (Tree().to_cpio(), "no usr/lib/kata-py/modules"),
        (b"\x28\xb5\x2f\xfd compressed", "compressed"),
    ],
)
def test_what_the_floor_cannot_use_is_told(archive: bytes, problem: str) -> None:
    with pytest.raises(BenchError, match=problem):
        boot_modules(archive)

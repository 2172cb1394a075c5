"""Guests on a read-only root image that dm-verity checks, configured with the lines that the builder prints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from guest_image import Manifest
from tests.integration.containerd import GUEST

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd

FOLDER = GUEST.with_name("guest-erofs")
_KERNEL_AND_INITRD = re.compile(r"(?m)^(kernel|initrd) = .*\n")

pytestmark = [
    pytest.mark.one_version,
    pytest.mark.usefixtures("restored_configuration"),
    pytest.mark.skipif(not (FOLDER / "rootfs.img").exists(), reason="no root images: run make root-images"),
]


def configure(containerd: Containerd, *, root_hash: str | None = None) -> None:
    lines = Manifest.read(FOLDER / "manifest.json").image_configuration(FOLDER)
    if root_hash is not None:
        lines = re.sub("root_hash=[0-9a-f]{64}", f"root_hash={root_hash}", lines)
    others = _KERNEL_AND_INITRD.sub("", containerd.config.read_text())
    containerd.config.write_text(
        others.replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{lines}\nenable_iothreads = true")
    )


def test_a_container_in_a_guest_on_a_root_image(containerd: Containerd) -> None:
    configure(containerd)
    done = containerd.run("sh", "-c", "echo written > /file; cat /file /proc/cmdline; exit 3")
    written, cmdline = done.stdout.splitlines()
    assert (done.returncode, done.stderr, written) == (3, "", "written")
    assert " root=/dev/dm-0 rootflags=ro rootfstype=erofs" in cmdline


def test_an_image_that_is_not_the_one_of_the_root_hash(containerd: Containerd) -> None:
    configure(containerd, root_hash="4f" * 32)
    container = containerd.new_id()
    done = containerd.run("true", container=container)
    containerd.ctr("containers", "rm", container)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "guest image: cannot mount /dev/dm-0 as erofs" in line

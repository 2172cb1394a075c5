"""Containers with disks that another program of the host serves, here QEMU's storage daemon."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.support.storage_daemon import served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.containerd import Containerd

pytestmark = [pytest.mark.one_version, pytest.mark.usefixtures("restored_configuration")]


@pytest.fixture
def store(containerd: Containerd) -> Path:
    """An empty store, in a configuration that has it."""
    folder = containerd.server.folder / "store"
    for name in ("devices", "sockets"):
        (folder / "block" / name).mkdir(parents=True, exist_ok=True)
    lines = f"enable_vhost_user_store = true\nvhost_user_store_path = '{folder}'\n"
    text = containerd.config.read_text()
    containerd.config.write_text(text.replace("[hypervisor.qemu]\n", f"[hypervisor.qemu]\n{lines}"))
    return folder / "block"


def node(store: Path, name: str, minor: int) -> str:
    path = store / "devices" / name
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(241, minor))
    return str(path)


def test_a_container_reads_and_writes_it(containerd: Containerd, store: Path) -> None:
    device, image = node(store, "disk0", 0), store.parent / "image"
    image.write_bytes(b"of the host\n" + bytes((1 << 20) - 12))
    script = "head -n 1 $0; echo of the guest | dd of=$0 bs=512 seek=1 conv=notrunc,fsync; ls -l $0"
    with served(image, store / "sockets" / "disk0"):
        done = containerd.run("sh", "-c", script, device, options=["--rm", "--device", device])
        assert done.returncode == 0, done
        assert done.stdout.startswith("of the host\nbrw-------"), done
        # And once more: the first machine has let go of it.
        again = containerd.run(
            "sh", "-c", "dd if=$0 bs=512 skip=1 count=1 2>/dev/null | head -n 1", device,
            options=["--rm", "--device", device],
        )  # fmt: skip
    assert again.stdout == "of the guest\n", again
    assert image.read_bytes()[512:525] == b"of the guest\n"


def test_nobody_serves_it(containerd: Containerd, store: Path) -> None:
    device = node(store, "disk7", 7)
    done = containerd.run("true", options=["--rm", "--device", device])
    assert done.returncode != 0
    assert (
        f"device {device}: {store}/sockets/disk7: No such file or directory; start the program" in done.stderr
    )

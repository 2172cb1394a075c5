"""Snapshots in a thin pool of the device mapper: the root file system of a container is a disk of the guest."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration import containerd as support

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

CONTROL, UDEV = Path("/dev/mapper/control"), Path("/run/udev/control")
# The pool's table counts in these; its blocks are 64 KiB, and it never warns of being full.
SECTOR_BYTES, BLOCK_SECTORS = 512, 128
DATA_BYTES, METADATA_BYTES = 512 << 20, 16 << 20


def said(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def containerd(adopted_orphans: None) -> Iterator[Containerd]:
    """In place of the one that other tests share: its snapshots are in a pool on two files."""
    if not CONTROL.exists():
        pytest.skip("this kernel has no device mapper")
    if shutil.which("dmsetup") is None:
        pytest.skip("needs dmsetup; packaging/setup.sh installs it")
    name = f"kp-{secrets.token_hex(4)}"
    with ExitStack() as undo:
        if not UDEV.exists():
            # Then libdevmapper makes the nodes below /dev/mapper, when it is told to.
            undo.enter_context(pytest.MonkeyPatch.context()).setenv("DM_DISABLE_UDEV", "1")
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="kp-pool-")))
        devices = []
        for each, size in (("metadata", METADATA_BYTES), ("data", DATA_BYTES)):
            with (folder / each).open("wb") as file:
                file.truncate(size)
            devices.append(said("losetup", "--find", "--show", str(folder / each)))
            undo.callback(said, "losetup", "--detach", devices[-1])
        table = f"0 {DATA_BYTES // SECTOR_BYTES} thin-pool {' '.join(devices)} {BLOCK_SECTORS} 0"
        said("dmsetup", "create", name, "--table", table)
        undo.callback(said, "dmsetup", "remove", "--retry", name)
        with support.running(name, thin_pool=name) as containerd:
            undo.callback(support.remove_namespace_cgroups, name)
            undo.callback(_remove_snapshots, name)
            yield containerd


def _remove_snapshots(pool: str) -> None:
    """What the image's layers are in: containerd keeps those of an image that it still has."""
    for line in said("dmsetup", "ls").splitlines():
        name = line.split()[0]
        if name.startswith(f"{pool}-"):
            said("dmsetup", "remove", "--retry", name)


def thin_devices(pool: str) -> set[str]:
    return {name for line in said("dmsetup", "ls").splitlines() if (name := line.split()[0]).startswith(pool)}


def test_root_file_systems_in_a_thin_pool(containerd: Containerd) -> None:
    """The guest has the snapshot as a disk and mounts it, not this host. What is written stays with its container."""
    before = thin_devices(containerd.server.thin_pool)
    script = "grep ' / ' /proc/mounts; test ! -e /new; echo here > /new; cat /new"
    container = containerd.start("sh", "-c", f"{script}; exec sleep 1000")
    mounted = Path("/proc/self/mountinfo").read_text()
    own = thin_devices(containerd.server.thin_pool) - before
    assert len(own) == 1
    assert own.pop() not in mounted
    done = containerd.exec(container, "sh", "-c", "grep ' / ' /proc/mounts; cat /new")
    assert done.stdout.split()[0].startswith("/dev/vd"), done
    assert done.stdout.split()[2] == "ext4"
    assert done.stdout.endswith("here\n")
    other = containerd.run("sh", "-c", script)
    assert other.returncode == 0, other.stderr
    assert other.stdout.endswith("here\n")
    containerd.remove(container)


def test_a_read_only_root_in_a_thin_pool(containerd: Containerd) -> None:
    done = containerd.run("sh", "-c", "touch /new; grep ' / ' /proc/mounts", options=["--rm", "--read-only"])
    assert " ext4 ro," in done.stdout, done

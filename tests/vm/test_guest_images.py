"""Guests whose root file system is a read-only disk, made by the builder and booted with Debian's own kernel."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from guest_image import Manifest
from guest_image.disk import FIRST_PARTITION_BYTES
from hypervisor.errors import BootFailed
from hypervisor.spec import Share
from hypervisor.verity import Verity
from tests.vm.guest import FOREIGN, GUEST, MARKS, OWN, VIRTIOFSD, running_guest

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.spec import RootfsDriver
    from tests.vm.guest import Software

#: Where `make root-images` puts them, and `make foreign`.
EXT4, EROFS = GUEST.with_name("guest-ext4"), GUEST.with_name("guest-erofs")
ARM64 = FOREIGN[0]
MOUNT_POINT = "/run/kata-containers/shared/containers/"

pytestmark = [
    *MARKS,
    pytest.mark.skipif(not VIRTIOFSD.exists(), reason="virtiofsd is not installed"),
    pytest.mark.skipif(
        not all((folder / "rootfs.img").exists() for folder in (EXT4, EROFS, ARM64.guest)),
        reason="no root images: run make root-images foreign",
    ),
]


def root(folder: Path, driver: RootfsDriver, *, verity: bool = False, **changes: Any) -> dict[str, Any]:
    """The part of a specification that says what boots."""
    image = folder / "rootfs.img"
    manifest = Manifest.read(folder / "manifest.json")
    return {
        "kernel": folder / "vmlinux",
        "image": image,
        "image_initrd": folder / "image-initrd.img",
        "image_bytes": image.stat().st_size,
        "rootfs_type": manifest.rootfs_type,
        "rootfs_driver": driver,
        "verity": Verity.parse(manifest.kernel_verity_params) if verity else None,
        **changes,
    }


def shared_rootfs(directory: Path, software: Software) -> Share:
    """A container's root file system comes from the host: the guest's own cannot be written to."""
    rootfs = directory / "passthrough" / "c1" / "rootfs"
    for name in ("bin", "proc", "dev", "sys", "guest"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(software.busybox, rootfs / "bin" / "busybox")
    for name in ("sh", "cat", "touch"):
        (rootfs / "bin" / name).symlink_to("busybox")
    extra = ("--thread-pool-size=1", "-o", "announce_submounts")
    return Share(tag="kataShared", directory=directory, daemon=VIRTIOFSD, extra_args=extra)


def seeing_the_guest(spec: oci_pb2.Spec) -> None:
    spec.Root.Path = f"{MOUNT_POINT}passthrough/c1/rootfs"
    spec.Mounts.add(destination="/guest", type="bind", source="/", options=["rbind"])


@pytest.mark.parametrize(
    ("software", "folder", "driver", "options", "mounted"),
    [
        pytest.param(OWN, EXT4, "virtio-blk", {"iothread": True}, "/dev/vda1 ext4", id="ext4-disk"),
        pytest.param(OWN, EROFS, "virtio-blk", {"verity": True}, "/dev/dm-0 erofs", id="erofs-disk-verity"),
        pytest.param(OWN, EXT4, "nvdimm", {}, "/dev/pmem0p1 ext4 dax", id="ext4-pmem"),
        pytest.param(OWN, EROFS, "nvdimm", {}, "/dev/pmem0p1 erofs dax", id="erofs-pmem"),
        pytest.param(OWN, EXT4, "nvdimm", {"verity": True}, "/dev/dm-0 ext4", id="ext4-pmem-verity"),
        pytest.param(ARM64, ARM64.guest, "virtio-blk", {"verity": True}, "/dev/dm-0 erofs", id="arm64"),
    ],
)
async def test_a_guest_on_a_root_image(
    software: Software,
    folder: Path,
    driver: RootfsDriver,
    options: dict[str, Any],
    mounted: str,
    tmp_path: Path,
) -> None:
    share = shared_rootfs(tmp_path / "shared", software)
    storage = pb.Storage(
        driver="virtio-fs", source=share.tag, fstype="virtiofs", options=["nodev"], mount_point=MOUNT_POINT
    )
    fields = root(folder, driver, **options)
    async with running_guest(tmp_path, shares=(share,), software=software, **fields) as guest:
        await guest.agent.create_sandbox(
            pb.CreateSandboxRequest(sandbox_id="sb", dns=["nameserver 192.0.2.53"], storages=[storage])
        )
        script = "cat /guest/proc/1/mounts /guest/etc/resolv.conf; ! touch /guest/init && touch /guest/tmp/x && echo ok"
        code, text = await guest.result("sh", "-c", script, change=seeing_the_guest)
    lines = text.decode().splitlines()
    assert (code, lines[-2:]) == (0, ["nameserver 192.0.2.53", "ok"])
    # The kernel keeps the empty root under it, which cannot be unmounted; what is seen is the last one.
    device, _, kind, flags = [line.split()[:4] for line in lines if line.split()[1:2] == ["/"]][-1]
    dax = [flag.partition("=")[0] for flag in flags.split(",") if flag.startswith("dax")]
    assert " ".join((device, kind, *dax)) == mounted
    assert flags.split(",")[0] == "ro"


# What dm-verity is for


def damaged(image: Path, target: Path, what: bytes) -> Path:
    """A copy with one bit turned round, at the first place in the root file system with `what`."""
    data = bytearray(image.read_bytes())
    data[data.index(what, FIRST_PARTITION_BYTES)] ^= 1
    target.write_bytes(data)
    return target


async def test_a_damaged_image_is_noticed(tmp_path: Path) -> None:
    fields = root(EROFS, "virtio-blk", verity=True)
    fields["image"] = damaged(fields["image"], tmp_path / "damaged.img", b"import bundle")
    with pytest.raises(BootFailed) as failed:
        async with running_guest(tmp_path, **fields):
            pass
    assert "the guest did not come up" in str(failed.value)
    assert any("is corrupted" in line for line in failed.value.console_tail), failed.value.console_tail


async def test_an_image_of_another_root_hash_is_refused(tmp_path: Path) -> None:
    fields = root(EXT4, "nvdimm", verity=True)
    fields["verity"] = replace(fields["verity"], root_hash="4f" * 32)
    with pytest.raises(BootFailed, match="guest image: cannot mount /dev/dm-0 as ext4"):
        async with running_guest(tmp_path, **fields):
            pass

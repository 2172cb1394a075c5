"""Which parts of a container become disks of its guest."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import oci_pb2
from config.schema import Qemu
from shim import disk_needs, mounts
from shim.api.gen.types_pb2 import Mount as ProtoMount
from shim.disk_needs import devices_on_disks, rootfs_on_disk, volume_on_disk
from shim.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from pathlib import Path

ON, OFF, PMEM = Qemu(), Qemu(disable_block_device_use=True), Qemu(block_device_driver="virtio-pmem")
HEADS = {
    "/dev/ext4": bytes(1080) + b"\x53\xef", "/dev/xfs": b"XFSB", "/dev/erofs": bytes(1024) + b"\xe2\xe1\xf5\xe0",
    "/dev/blank": bytes(2048),
}  # fmt: skip


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Block devices are below /dev, image files end with .img."""

    def kind(source: str, *, namespace: int | None = None) -> int:
        if source.startswith("/dev/"):
            return stat.S_IFBLK
        return stat.S_IFREG if source.endswith(".img") else stat.S_IFDIR if source == "/dir" else 0

    def opened(source: str, *, writable: bool, namespace: int | None = None) -> int:
        path = tmp_path / "head"
        path.write_bytes(HEADS[source])
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    monkeypatch.setattr(mounts, "kind_of", kind)
    monkeypatch.setattr(mounts, "open_source", opened)
    monkeypatch.setattr(disk_needs, "DIRECT_VOLUMES", str(tmp_path / "direct"))
    files = {(7, 0): "/dev/loop0", (8, 1): "/dev/sda1"}
    monkeypatch.setattr(disk_needs, "_device_file", lambda major, minor: files.get((major, minor)))


def rootfs(*found: ProtoMount, qemu: Qemu = ON) -> disk_needs.Need | None:
    return rootfs_on_disk("c1", found, "/guest/rootfs", qemu, None)


EXT4 = ProtoMount(type="ext4", source="/snapshots/1.img", options=["loop", "rw", "discard"])


@pytest.mark.parametrize(
    ("mount", "options", "read_only", "discard"),
    [
        (EXT4, ["rw", "discard"], False, True),
        (ProtoMount(type="ext4", source="/snapshots/1.img", options=["ro", "loop"]), ["ro"], True, False),
        (ProtoMount(type="ext4", source="/dev/mapper/thin-1", options=[]), [], False, False),
        (
            ProtoMount(type="xfs", source="/dev/mapper/thin-1", options=["noatime"]),
            ["noatime", "nouuid"],
            False,
            False,
        ),
    ],
)
def test_a_root_on_a_disk(mount: ProtoMount, options: list[str], read_only: bool, discard: bool) -> None:
    need = rootfs(mount)
    assert need is not None
    assert (need.path, need.fstype, need.mount_point) == (mount.source, mount.type, "/guest/rootfs")
    assert (need.options, need.read_only, need.discard) == (options, read_only, discard)


@pytest.mark.parametrize(
    "found",
    [
        (),
        (EXT4, EXT4),
        (ProtoMount(type="overlay", source="overlay"),),
        (ProtoMount(type="bind", source="/dev/sda1", options=["rbind"]),),
        (ProtoMount(type="ext4", source="/snapshots/1.img", options=["rw"]),),
        (ProtoMount(type="ext4", source="relative.img", options=["loop"]),),
        (ProtoMount(type="ext4", source="/none", options=["loop"]),),
    ],
)
def test_roots_that_are_the_hosts_to_mount(found: tuple[ProtoMount, ...]) -> None:
    assert rootfs(*found) is None
    assert rootfs(EXT4, qemu=OFF) is None


def test_no_disk_of_persistent_memory_is_added() -> None:
    with pytest.raises(
        NotSupported, match=r"root file system of container c1 needs a disk.*set block_device_driver"
    ):
        rootfs(EXT4, qemu=PMEM)


def container(*devices: tuple[str, str, int, int], rules: tuple[tuple[Any, ...], ...] = ()) -> oci_pb2.Spec:
    spec = oci_pb2.Spec()
    for path, kind, major, minor in devices:
        spec.Linux.Devices.add(Path=path, Type=kind, Major=major, Minor=minor, FileMode=0o640)
    for kind, major, minor, access in rules:
        spec.Linux.Resources.Devices.add(Allow=True, Type=kind, Major=major, Minor=minor, Access=access)
    return spec


ALL = ("a", -1, -1, "rwm")


@pytest.mark.parametrize(
    ("spec", "disks"),
    [
        (container(), []),
        (container(("/dev/fuse", "c", 10, 229)), []),
        (container(("/dev/loop0", "b", 7, 0)), [("/dev/loop0", "/dev/loop0", False)]),
        (
            container(("/dev/xvda", "b", 7, 0), rules=(("b", 7, 0, "rwm"),)),
            [("/dev/loop0", "/dev/xvda", False)],
        ),
        (
            container(("/dev/xvda", "b", 7, 0), rules=(("b", 7, 0, "rm"),)),
            [("/dev/loop0", "/dev/xvda", True)],
        ),
        # Privileged: all of the host's, which the guest does not get; one that is meant, by a rule or another name.
        (container(("/dev/loop0", "b", 7, 0), ("/dev/gone", "b", 9, 9), rules=(ALL,)), []),
        (
            container(("/dev/loop0", "b", 7, 0), rules=(("b", 7, 0, "rw"), ALL)),
            [("/dev/loop0", "/dev/loop0", False)],
        ),
        (
            container(("/dev/loop0", "b", 7, 0), ("/dev/data", "b", 8, 1), rules=(ALL,)),
            [("/dev/sda1", "/dev/data", False)],
        ),
    ],
)
def test_devices(spec: oci_pb2.Spec, disks: list[tuple[str, str, bool]]) -> None:
    needs = devices_on_disks(spec, ON)
    assert [(need.path, need.container_path, need.read_only) for need in needs.disks] == disks
    assert [device.Path for device in needs.devices] == [path for _, path, _ in disks]
    del spec.Linux.Devices[:]
    needs.name_devices_in(spec)
    needs.name_devices_in(spec)
    assert [(device.Path, device.FileMode) for device in spec.Linux.Devices] == [
        (path, 0o640) for _, path, _ in disks
    ]


@pytest.mark.parametrize(
    ("spec", "qemu", "error", "message"),
    [
        (container(("/dev/x", "b", 9, 9)), ON, InvalidRequest, "/dev/x: the host has no block device 9:9"),
        (
            container(("/dev/loop0", "b", 7, 0)),
            OFF,
            InvalidRequest,
            "disable_block_device_use is set; remove it",
        ),
        (container(("/dev/loop0", "b", 7, 0)), PMEM, NotSupported, "device /dev/loop0 needs a disk"),
    ],
)
def test_devices_that_are_refused(
    spec: oci_pb2.Spec, qemu: Qemu, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        devices_on_disks(spec, qemu)


def volume(kind: str, source: str, target: str = "/data", *options: str) -> oci_pb2.Mount:
    return oci_pb2.Mount(type=kind, source=source, destination=target, options=options)


BIND = ("rbind", "rprivate", "rw")


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        (volume("ext4", "/data.img", "/data", "loop", "noatime"), {"fstype": "ext4", "options": ["noatime"]}),
        (volume("xfs", "/dev/xfs"), {"fstype": "xfs", "options": ["nouuid"]}),
        (volume("bind", "/dev/ext4", "/data", *BIND), {"fstype": "ext4", "options": ["rw"]}),
        (volume("bind", "/dev/erofs", "/data", "bind", "ro"), {"fstype": "erofs", "read_only": True}),
        (volume("bind", "/dev/blank", "/disk", *BIND), {"container_path": "/disk", "fstype": ""}),
        (
            volume("bind", "/dev/ext4", "/dev/xda", "rbind", "ro"),
            {"container_path": "/dev/xda", "read_only": True},
        ),
    ],
)
def test_volumes(mount: oci_pb2.Mount, expected: dict[str, Any]) -> None:
    need = volume_on_disk(mount, mount.source, ON, None)
    assert need is not None
    assert need.path == mount.source
    assert {name: getattr(need, name) for name in expected} == expected
    assert (need.mount is mount) == (not need.container_path)
    assert volume_on_disk(mount, mount.source, OFF, None) is None
    with pytest.raises(NotSupported, match=f"volume {mount.destination} needs a disk"):
        volume_on_disk(mount, mount.source, PMEM, None)


@pytest.mark.parametrize(
    "mount",
    [
        volume("proc", "proc"), volume("tmpfs", "tmpfs"), volume("bind", "/dir", "/data", "rbind"),
        volume("bind", "/data.img", "/data", "rbind"), volume("ext4", "/data.img"),
        volume("bind", "/none", "/x", "bind"),
    ],
)  # fmt: skip
def test_mounts_that_are_none(mount: oci_pb2.Mount) -> None:
    assert volume_on_disk(mount, mount.source, ON, None) is None


def describe(text: str, source: str = "/dir") -> None:
    folder = disk_needs.direct_volume_folder(source)
    os.makedirs(folder)
    with open(f"{folder}/mountInfo.json", "w") as file:
        file.write(text)


def info(**changed: object) -> str:
    return json.dumps({"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", **changed})


def test_a_direct_volume() -> None:
    group = {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch", "encryptionKey": ""}
    describe(info(metadata=group, options=["noatime"], unknown=1))
    mount = volume("bind", "/dir", "/data", "rbind", "ro")
    need = volume_on_disk(mount, "/dir", ON, None)
    assert need is not None
    assert (need.path, need.fstype, need.options) == ("/dev/sdf", "ext4", ["noatime", "ro"])
    assert need.read_only
    assert need.fs_group is not None
    assert (need.fs_group.group_id, need.fs_group.group_change_policy) == (1000, 1)
    with pytest.raises(
        InvalidRequest, match="is to be mounted by the guest, and disable_block_device_use is set"
    ):
        volume_on_disk(mount, "/dir", OFF, None)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", InvalidRequest, r"mountInfo\.json: .*; see kata-py direct-volume"),
        ("{}", InvalidRequest, "missing required field `volume-type`"),
        (info(**{"volume-type": "spdkvol"}), NotSupported, "volume-type 'spdkvol'; known are block devices"),
        (info(metadata={"fsGroup": "x"}), InvalidRequest, "fsGroup 'x' is no group id"),
    ],
)
def test_descriptions_that_are_none(text: str, error: type[Exception], message: str) -> None:
    describe(text)
    with pytest.raises(error, match=message):
        volume_on_disk(volume("bind", "/dir", "/data", "rbind"), "/dir", ON, None)


def test_sources_whose_description_could_not_be_named() -> None:
    assert volume_on_disk(volume("bind", "/dir", "/data", "rbind"), "/" + "x" * 255, ON, None) is None


def test_options_of_the_containers_own_mount() -> None:
    options = ["loop", "rw", "noatime", "nosuid", "rbind", "rslave"]
    assert disk_needs.of_bind(options) == ["rbind", "rw", "nosuid", "rslave"]

"""Root file systems of layers: which mounts are such, what becomes a disk of the guest, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config.schema import Qemu
from shim.api.gen.types_pb2 import Mount
from shim.disk_needs import Need, NewImage
from shim.errors import InvalidRequest, NotSupported
from shim.layers import MOST, Layer, Layers, described, disks

if TYPE_CHECKING:
    from pathlib import Path

ROOT = "/guest/rootfs"


def snapshot(folder: Path, number: int, *, layer: bool = True) -> str:
    """The directory that shows what is in the layer."""
    merged = folder / str(number) / "fs"
    merged.mkdir(parents=True)
    if layer:
        (folder / str(number) / "layer.erofs").touch()
    return str(merged)


def overlay(*options: str, kind: str = "overlay") -> Mount:
    return Mount(type=kind, source="overlay", options=options)


def erofs(path: str, *options: str) -> Mount:
    return Mount(type="erofs", source=path, options=["ro", "loop", *options])


def writable(*options: str, kind: str = "mkfs/ext4") -> Mount:
    return Mount(type=kind, source="/snapshots/9/rwlayer.img", options=[*options, "rw", "loop"])


UPPER = ("workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper")
MKDIR = (
    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
)


def test_an_overlay_of_mounted_layers(tmp_path: Path) -> None:
    lowers = [snapshot(tmp_path, number) for number in (2, 1)]
    upper = snapshot(tmp_path, 3, layer=False)
    work = f"{tmp_path}/3/work"
    options = [f"workdir={work}", f"upperdir={upper}", f"lowerdir={':'.join(lowers)}", "index=off"]
    found = described("c", [overlay(*options)], None)
    assert found is not None
    assert [layer.path for layer in found.lowers] == [f"{tmp_path}/{number}/layer.erofs" for number in (2, 1)]
    assert (found.upper, found.work, found.options) == (upper, work, ("index=off",))
    assert not found.written_on_host
    (tmp_path / "3" / "fs" / "file").touch()
    assert found.written_on_host


def test_other_root_file_systems(tmp_path: Path) -> None:
    plain = snapshot(tmp_path, 1, layer=False)
    mixed = [snapshot(tmp_path, 2), plain]
    for rootfs in (
        [],
        [overlay(f"lowerdir={plain}", "upperdir=/u", "workdir=/w")],
        [overlay(f"lowerdir={':'.join(mixed)}", "upperdir=/u", "workdir=/w")],
        [overlay("lowerdir=/somewhere/else")],
        [overlay()],
        [Mount(type="bind", source="/x", options=["rbind"])],
        [erofs("/layer.erofs")],  # one disk, as of any snapshotter
        [Mount(type="ext4", source="/x", options=["loop"])],
        [Mount(type="mkfs/ext4", source="/x"), Mount(type="format/mkdir/bind", source="{{ mount 0 }}/upper")],
    ):
        assert described("c", rootfs, None) is None


def test_described_mounts() -> None:
    layers = [erofs("/b"), erofs("/a", "device=/c", "device=/d")]
    end = overlay(*MKDIR, *UPPER, "lowerdir={{ overlay 1 2 }}", "volatile", kind="format/mkdir/overlay")
    found = described(
        "c", [writable("X-containerd.mkfs.size=1048576", "X-containerd.mkfs.fs=ext4"), *layers, end], None
    )
    what = "the root file system of container c"
    assert found == Layers(
        what=what,
        lowers=(Layer(path="/b"), Layer(path="/a", rest=("/c", "/d"))),
        image=NewImage(
            folder="/snapshots/9",
            name="rwlayer.img",
            what=what,
            otherwise="use the snapshotter overlayfs",
            size_bytes=1 << 20,
        ),
        options=("volatile",),
    )


@pytest.mark.parametrize(
    ("mounts", "lowers"),
    [
        (
            [erofs("/b"), erofs("/a"), overlay("lowerdir={{ overlay 0 1 }}", kind="format/overlay")],
            ["/b", "/a"],
        ),
        (
            [erofs("/a"), erofs("/b"), overlay("lowerdir={{ overlay 1 0 }}", kind="format/overlay")],
            ["/b", "/a"],
        ),
        (
            [erofs("/b"), erofs("/a"), overlay("lowerdir={{ mount 0 }}:{{mount 1}}", kind="format/overlay")],
            ["/b", "/a"],
        ),
        ([erofs("/a"), Mount(type="format/bind", source="{{ mount 0 }}", options=["ro", "rbind"])], ["/a"]),
        ([erofs("/a", "device=/b")], ["/a"]),
    ],
)
def test_what_is_only_read(mounts: list[Mount], lowers: list[str]) -> None:
    found = described("c", mounts, None)
    assert found is not None
    assert [layer.path for layer in found.lowers] == lowers
    assert (found.upper, found.work, found.image, found.options) == ("", "", None, ())


@pytest.mark.parametrize(
    ("mounts", "kind", "message"),
    [
        ([erofs("/a", "X-containerd.dmverity=/m"), overlay("lowerdir={{ mount 0 }}", kind="format/overlay")],
         NotSupported, "the option X-containerd.dmverity of layer /a; set the snapshotter's dmverity_mode to off"),
        ([Mount(type="mkfs/xfs"), erofs("/a"), overlay("lowerdir={{ mount 1 }}", kind="format/overlay")],
         NotSupported, "a mount of type mkfs/xfs"),
        ([writable("X-containerd.mkfs.fs=xfs"), erofs("/a"), overlay("lowerdir={{ mount 1 }}", kind="format/overlay")],
         NotSupported, "/snapshots/9/rwlayer.img as xfs of  bytes; known is ext4"),
        ([writable("X-containerd.mkfs.size=1e9"), erofs("/a"),
          overlay("lowerdir={{ mount 1 }}", kind="format/overlay")],
         NotSupported, "as ext4 of 1e9 bytes"),
        ([erofs("/a"), overlay("lowerdir={{ overlay 0 900 }}", kind="format/overlay")],
         NotSupported, "is not made of layers with erofs alone"),
        ([erofs("/a"), overlay("lowerdir=/other:{{ mount 7 }}", kind="format/overlay")],
         NotSupported, "is not made of layers with erofs alone"),
        ([erofs("/a"), overlay("lowerdir=", kind="format/overlay")],
         NotSupported, "is not made of layers with erofs alone"),
        ([erofs("/a"), overlay("upperdir={{ mount 5 }}/upper", "workdir={{ mount 5 }}/work", "lowerdir={{ mount 0 }}",
                               kind="format/overlay")],
         NotSupported, "is to be written to {{ mount 5 }}/upper"),
        ([writable(), erofs("/a"), overlay("upperdir={{ mount 0 }}/upper", "workdir=/w", "lowerdir={{ mount 1 }}",
                                           kind="format/overlay")],
         NotSupported, "is to be written to {{ mount 0 }}/upper"),
        ([erofs("/a"), Mount(type="format/tmpfs")], NotSupported, "a mount of type format/tmpfs"),
        ([writable(), erofs("/a"),
          overlay("upperdir={{ mount 0 }}/../x", "workdir={{ mount 0 }}/work", "lowerdir={{ mount 1 }}",
                  kind="format/overlay")],
         NotSupported, "is to be written to {{ mount 0 }}/../x"),
    ],
)  # fmt: skip
def test_what_is_refused(mounts: list[Mount], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        described("c", mounts, None)
    assert str(caught.value).startswith("the root file system of container c")
    assert message in str(caught.value)


def test_too_many_layers() -> None:
    mounts = [erofs(f"/{number}") for number in range(MOST + 1)]
    last = overlay(f"lowerdir={{{{ overlay 0 {MOST} }}}}", kind="format/overlay")
    with pytest.raises(InvalidRequest, match=r"has 128 layers, and 127 are the most"):
        described("c", [*mounts, last], None)
    assert described("c", [*mounts[1:], overlay("lowerdir={{ overlay 0 126 }}", kind="format/overlay")], None)


LAYERS = Layers(what="it", lowers=(Layer(path="/b"), Layer(path="/a", rest=("/c",))))


def with_upper() -> Layers:
    return Layers(what="it", lowers=LAYERS.lowers, upper="/u", work="/w", options=("index=off",))


def test_the_disks_of_the_guest() -> None:
    found = disks(with_upper(), Qemu(), ROOT)
    assert [(need.path, need.read_only, need.fstype) for need in found.needs] == [
        ("/c", True, ""), ("/b", True, "erofs"), ("/a", True, "erofs"), ("/w/kata-disk.img", False, "ext4"),
    ]  # fmt: skip
    assert found.rest[0].rest_of is found.lowers[1]
    for number, need in enumerate(found.needs):
        need.place = f"/p{number}"
    (storage,) = found.storages()
    assert (storage.driver, storage.fstype, storage.mount_point) == ("overlayfs", "overlay", ROOT)
    assert list(storage.options) == [
        "index=off",
        "lowerdir=/p1:/p2",
        "upperdir=/p3/upper",
        "workdir=/p3/work",
    ]


def test_without_anything_to_write_to() -> None:
    found = disks(LAYERS, Qemu(), ROOT)
    for number, need in enumerate(found.needs):
        need.place = f"/p{number}"
    (storage,) = found.storages()
    assert list(storage.options) == ["lowerdir=/p1:/p2", "ro"]
    # One layer is the root file system itself.
    found = disks(Layers(what="it", lowers=LAYERS.lowers[:1]), Qemu(), ROOT)
    assert found.storages() == []
    assert [need.mount_point for need in found.needs] == [ROOT]


def test_no_disks_of_that_kind() -> None:
    with pytest.raises(NotSupported, match="it needs a disk, and no persistent memory"):
        disks(LAYERS, Qemu(block_device_driver="virtio-pmem"), ROOT)


def test_need_of_a_new_image_knows_its_path() -> None:
    image = NewImage(folder="/f/", name="i", what="w", otherwise="o")
    assert Need(path=image.path).path == "/f/i"

"""Root file systems of layers: containerd's snapshotter `erofs` has each layer of an image in a file with erofs.

The guest mounts the layers, as disks that containers and sandboxes share, and an overlay of them: what the container
writes is on a disk of its own. Up to containerd 2.1 the snapshotter mounts the layers on the host, and names an overlay
of these mount points. Later ones describe all mounts, with placeholders for the places of those before, to a runtime
that carries them out itself.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent_proto.gen import agent_pb2
from shim import mounts
from shim.disk_needs import Need, NewImage, check_driver
from shim.errors import InvalidRequest, NotSupported
from shim.ext4_images import OPTIONS, open_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from config.schema import Qemu
    from shim.api.gen.types_pb2 import Mount as ProtoMount

# The snapshotter's names of a layer in a snapshot's folder, and of the directory that shows what is in it.
LAYER, MERGED = "layer.erofs", "fs"
# For what a container writes; in the folder that an overlay has for its own purposes, and which goes with the snapshot.
WRITTEN = "kata-disk.img"
# As many as an image may have.
MOST = 127
_PLACE = re.compile(r"\{\{\s*mount (\d{1,3})\s*\}\}")
_PLACES = re.compile(r"\{\{\s*overlay (\d{1,3}) (\d{1,3})\s*\}\}")
# What containerd is to do before a mount: put in the places, make directories, make a file system.
_MANAGED = ("format/", "mkdir/", "mkfs/")
_OPTION = "X-containerd."
_MKFS_SIZE, _MKFS_KIND, _MKDIR = f"{_OPTION}mkfs.size=", f"{_OPTION}mkfs.fs=", f"{_OPTION}mkdir.path="
# Those that are not passed on: the mounts as such, and what the guest's overlay is given by its own names.
_MOUNTS_OWN = frozenset({"ro", "rw", "rbind", "bind", "loop"})


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One image with erofs; `rest` are files with more of what is in it."""

    path: str
    rest: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A root file system: its layers, the uppermost first, and where what is written goes: to directories of the host,
    or to an image with ext4. `options` are the overlay's."""

    what: str
    lowers: tuple[Layer, ...]
    upper: str = ""
    work: str = ""
    image: NewImage | None = None
    options: tuple[str, ...] = ()

    @property
    def written_on_host(self) -> bool:
        """Whether there is something in a directory of the host that the container has to see."""
        return bool(self.upper) and bool(os.listdir(self.upper))


@dataclass(kw_only=True)
class LayerDisks:
    """The disks of a guest that a root file system is put together from."""

    layers: Layers
    mount_point: str
    lowers: list[Need] = field(default_factory=list)
    upper: Need | None = None
    rest: list[Need] = field(default_factory=list)

    @property
    def needs(self) -> list[Need]:
        """All of them, in the order in which they are plugged in and mounted."""
        return [*self.rest, *self.lowers, *([self.upper] if self.upper else [])]

    def storages(self) -> list[agent_pb2.Storage]:
        """What is to be mounted over the disks, when these have their places."""
        if self.upper is None and len(self.lowers) == 1:
            return []  # it is mounted there itself
        options = [*self.layers.options, "lowerdir=" + ":".join(need.place for need in self.lowers)]
        if self.upper is not None:
            options += [f"upperdir={self.upper.place}/upper", f"workdir={self.upper.place}/work"]
        else:
            options.append("ro")
        return [
            agent_pb2.Storage(
                driver="overlayfs",
                source="overlay",
                fstype="overlay",
                options=options,
                mount_point=self.mount_point,
            )
        ]


def described(container_id: str, rootfs: Sequence[ProtoMount], namespace: int | None) -> Layers | None:
    """The layers of a root file system; None when it is of another kind.

    Raises InvalidRequest, NotSupported, OSError.
    """
    what = f"the root file system of container {container_id}"
    layers = None
    if len(rootfs) == 1 and rootfs[0].type == "overlay":
        layers = _mounted_on_host(what, rootfs[0], namespace)
    elif rootfs and _is_described(rootfs):
        layers = _described(what, rootfs)
    if layers is not None and len(layers.lowers) > MOST:
        raise InvalidRequest(
            f"{what} has {len(layers.lowers)} layers, and {MOST} are the most that are put together; build the image "
            "with fewer, or use the snapshotter overlayfs"
        )
    return layers


def disks(layers: Layers, qemu: Qemu, mount_point: str) -> LayerDisks:
    """The disks of the guest for it. Raises NotSupported."""
    check_driver(qemu, layers.what)
    found = LayerDisks(layers=layers, mount_point=mount_point)
    for layer in layers.lowers:
        need = Need(path=layer.path, read_only=True, fstype="erofs", options=["ro"])
        found.rest += [Need(path=path, read_only=True, rest_of=need) for path in layer.rest]
        found.lowers.append(need)
    image = layers.image
    if image is None and layers.work:
        image = NewImage(
            folder=layers.work,
            name=WRITTEN,
            what=layers.what,
            otherwise="set disable_block_device_use",
        )
    if image is not None:
        found.upper = Need(path=image.path, discard=True, fstype="ext4", options=OPTIONS, image=image)
    elif len(found.lowers) == 1:
        found.lowers[0].mount_point = mount_point
    return found


async def make_image(layers: Layers, namespace: int | None) -> None:
    """What the host has to make before it can mount them itself. Raises as `open_image`."""
    if layers.image is not None:
        os.close(await open_image(layers.image, namespace))


def mount_on_host(layers: Layers, folder: Path, target: str, namespace: int | None, undo: ExitStack) -> None:
    """Mount the layers below a new folder of the host's, and an overlay of them at `target`. Raises OSError."""
    folder.mkdir(parents=True)
    undo.callback(folder.rmdir)

    def mounted(name: str, kind: str, path: str, options: list[str]) -> str:
        place = folder / name
        place.mkdir()
        undo.callback(place.rmdir)
        undo.callback(mounts.detach, str(place))
        mounts.mount_with_options(kind, path, str(place), [*options, "loop"], namespace=namespace)
        return str(place)

    lowers = []
    for index, layer in enumerate(layers.lowers):
        if layer.rest:
            raise NotSupported(
                f"{layers.what}: {layer.path} has parts in {len(layer.rest)} other files, which only a guest puts "
                "together; remove disable_block_device_use"
            )
        lowers.append(mounted(str(index), "erofs", layer.path, ["ro"]))
    upper, work = layers.upper, layers.work
    if layers.image is not None:
        top = mounted("upper", "ext4", layers.image.path, [])
        upper, work = f"{top}/upper", f"{top}/work"
        for path in (upper, work):
            os.makedirs(path, 0o755, exist_ok=True)
    undo.callback(mounts.detach, target)
    if not upper and len(lowers) == 1:
        mounts.bind(lowers[0], target)
        return
    options = [*layers.options, "lowerdir=" + ":".join(lowers)]
    options += [f"upperdir={upper}", f"workdir={work}"] if upper else ["ro"]
    mounts.mount_with_options("overlay", "overlay", target, options)


def _mounted_on_host(what: str, overlay: ProtoMount, namespace: int | None) -> Layers | None:
    """An overlay of directories that each are a mount point of a layer beside them."""
    words = dict(option.partition("=")[::2] for option in overlay.options)
    lowers = []
    for folder in words.get("lowerdir", "").split(":"):
        snapshot, _, name = folder.rpartition("/")
        layer = f"{snapshot}/{LAYER}"
        if name != MERGED or mounts.kind_of(layer, namespace=namespace) != stat.S_IFREG:
            return None
        lowers.append(Layer(path=layer))
    return Layers(
        what=what,
        lowers=tuple(lowers),
        upper=words.get("upperdir", ""),
        work=words.get("workdir", ""),
        options=_overlays_own(overlay.options),
    )


def _is_described(rootfs: Sequence[ProtoMount]) -> bool:
    managed = any(mount.type.startswith(_MANAGED) for mount in rootfs)
    in_parts = len(rootfs) == 1 and any(option.startswith("device=") for option in rootfs[0].options)
    return (managed or in_parts) and any(mount.type == "erofs" for mount in rootfs)


def _described(what: str, rootfs: Sequence[ProtoMount]) -> Layers:
    parts, last = (rootfs[:-1], rootfs[-1]) if len(rootfs) > 1 else (rootfs, None)
    layers: dict[int, Layer] = {}
    images: dict[int, NewImage] = {}
    for index, mount in enumerate(parts):
        if mount.type == "erofs":
            layers[index] = _layer(what, mount)
        elif mount.type in ("mkfs/ext4", "ext4"):
            images[index] = _image(what, mount)
        else:
            raise NotSupported(f"{what} has a mount of type {mount.type}; use the snapshotter overlayfs")
    if last is None:
        return Layers(what=what, lowers=tuple(layers.values()))
    kind = last.type
    for prefix in _MANAGED:
        kind = kind.replace(prefix, "")
    words = dict(option.partition("=")[::2] for option in last.options)
    if kind == "bind":
        below = [last.source]
    elif kind == "overlay":
        below = words.get("lowerdir", "").split(":")
    else:
        raise NotSupported(f"{what} has a mount of type {last.type}; use the snapshotter overlayfs")
    numbers = [number for place in below for number in _numbers(place)]
    if not numbers or not all(number in layers for number in numbers):
        raise NotSupported(f"{what} is not made of layers with erofs alone: {last.type} of {':'.join(below)}")
    upper, work = words.get("upperdir", ""), words.get("workdir", "")
    image = next((images[number] for number in _numbers(upper) if number in images), None)
    known = _PLACE.sub("", upper) == "/upper" and _PLACE.sub("", work) == "/work"
    if _numbers(upper) != _numbers(work) or (_numbers(upper) and not (image and known)):
        raise NotSupported(f"{what} is to be written to {upper}; known are /upper and /work of a file system")
    return Layers(
        what=what,
        lowers=tuple(layers[number] for number in numbers),
        upper="" if image else upper,
        work="" if image else work,
        image=image,
        options=_overlays_own(last.options) if kind == "overlay" else (),
    )


def _layer(what: str, mount: ProtoMount) -> Layer:
    for option in mount.options:
        if option.startswith(_OPTION):
            # Mounted without it, nobody would notice what has been changed.
            raise NotSupported(
                f"{what}: the option {option.partition('=')[0]} of layer {mount.source}; set the snapshotter's "
                "dmverity_mode to off"
            )
    rest = [option.removeprefix("device=") for option in mount.options if option.startswith("device=")]
    return Layer(path=mount.source, rest=tuple(rest))


def _image(what: str, mount: ProtoMount) -> NewImage:
    words = {
        name: next((o[len(name) :] for o in mount.options if o.startswith(name)), "")
        for name in (_MKFS_SIZE, _MKFS_KIND)
    }
    size, kind = words[_MKFS_SIZE], words[_MKFS_KIND] or "ext4"
    if kind != "ext4" or (size and not size.isdecimal()):
        raise NotSupported(f"{what}: {mount.source} as {kind} of {size} bytes; known is ext4")
    folder, _, name = mount.source.rpartition("/")
    return NewImage(
        folder=folder,
        name=name,
        what=what,
        otherwise="use the snapshotter overlayfs",
        size_bytes=int(size or 0),
    )


def _numbers(place: str) -> list[int]:
    """Of the mounts that a place names."""
    if found := _PLACES.fullmatch(place):
        first, last = int(found[1]), int(found[2])
        step = 1 if first <= last else -1
        return list(range(first, last + step, step))
    found = _PLACE.match(place)
    return [int(found[1])] if found else []


def _overlays_own(options: Sequence[str]) -> tuple[str, ...]:
    ours = ("lowerdir=", "upperdir=", "workdir=", _MKDIR)
    return tuple(option for option in options if option not in _MOUNTS_OWN and not option.startswith(ours))

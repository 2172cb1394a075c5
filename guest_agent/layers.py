"""Root file systems in layers, as Kata's runtime asks for them: several storages for one mount point, with marks.

Each of them becomes a storage with a mount point of its own, and an overlay of these is added at the one that they
share. So they are mounted, counted and unmounted like all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_proto.gen import agent_pb2
from guest_agent.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "/run/kata-containers/sandbox/layers"
_MARK = "X-kata."
_LAYER, _UPPER, _LOWER = "X-kata.multi-layer=true", "X-kata.overlay-upper", "X-kata.overlay-lower"
_PARTITIONED, _PARTITION = "X-kata.gpt-partitioned=true", "X-kata.partition-number="
_MAKE_DIR = "X-kata.mkdir.path="
#: The overlay's own directories are made in any case.
_MADE = ("{{ mount 0 }}/upper", "{{ mount 0 }}/work")
#: As many as the kernel puts on top of each other.
_MOST = 500


def spread(storages: Sequence[agent_pb2.Storage], user: str) -> list[agent_pb2.Storage]:
    """All storages, those in layers with mount points of their own. Raises InvalidRequest, NotSupported."""
    layers = [storage for storage in storages if _LAYER in storage.options]
    rest = [storage for storage in storages if _LAYER not in storage.options]
    for storage in rest:
        _refuse_marks(storage, storage.options)
    if not layers:
        return rest
    places = {storage.mount_point for storage in layers}
    uppers = [storage for storage in layers if _UPPER in storage.options]
    lowers = [storage for storage in layers if _UPPER not in storage.options]
    what = f"storage {layers[0].mount_point} in layers"
    if len(places) > 1 or len(uppers) > 1 or not 0 < len(lowers) <= _MOST:
        raise InvalidRequest(
            f"{what}: {len(lowers)} read-only layers and {len(uppers)} writable ones for {len(places)} mount points; "
            f"there may be 1 to {_MOST}, 1 and 1"
        )
    below = [_layer(storage, f"{FOLDER}/{user}.{index}") for index, storage in enumerate(lowers)]
    place = f"{FOLDER}/{user}.upper"
    if uppers:
        upper = _layer(uppers[0], place)
    else:
        upper = agent_pb2.Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=place)
    lowerdir = ":".join(storage.mount_point for storage in below)
    overlay = agent_pb2.Storage(
        driver="overlayfs",
        source="overlay",
        fstype="overlay",
        options=[f"lowerdir={lowerdir}", f"upperdir={place}/upper", f"workdir={place}/work"],
        mount_point=layers[0].mount_point,
    )
    return [*below, upper, overlay, *rest]


def _layer(storage: agent_pb2.Storage, mount_point: str) -> agent_pb2.Storage:
    """One layer, at its own mount point and without the marks."""
    kept, number, partitioned = [], "", False
    for option in storage.options:
        if option == _PARTITIONED:
            partitioned = True
        elif option.startswith(_PARTITION):
            number = option.removeprefix(_PARTITION)
        elif option.startswith(_MAKE_DIR):
            path = option.removeprefix(_MAKE_DIR).rsplit(":", 1)[0]
            if path not in _MADE:
                raise NotSupported(f"storage {storage.mount_point}: a directory {path!r} in its layers")
        elif option not in (_LAYER, _UPPER, _LOWER):
            kept.append(option)
    _refuse_marks(storage, kept)
    if storage.fstype == "erofs" and "ro" not in kept:
        kept.append("ro")
    source = storage.source
    if partitioned:
        if not number.isdecimal():
            raise InvalidRequest(f"storage {storage.mount_point}: {number!r} is no number of a partition")
        # As the kernel names them: sda1, but nvme0n1p1.
        source += f"p{number}" if source[-1:].isdecimal() else number
    return agent_pb2.Storage(
        driver=storage.driver, source=source, fstype=storage.fstype, options=kept, mount_point=mount_point
    )


def _refuse_marks(storage: agent_pb2.Storage, options: Sequence[str]) -> None:
    for option in options:
        if option.startswith(_MARK):
            raise NotSupported(f"storage {storage.mount_point}: the option {option.partition('=')[0]}")

"""Container Device Interface: which files of the host stand for a device with a name like `vendor.com/gpu=0`.

The descriptions are files that device vendors' tools write, YAML or JSON. Here they matter for devices that a guest is
given (VFIO); what else they say is for engines that run containers on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from shim.errors import DevicesUnknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

log = structlog.get_logger()

ANNOTATION_PREFIX = "cdi.k8s.io/"
#: Of these the later one wins.
FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
_SUFFIXES = (".json", ".yaml", ".yml")


class _Node(msgspec.Struct, frozen=True, rename="camel"):
    path: str
    host_path: str = ""


class _Edits(msgspec.Struct, frozen=True, rename="camel"):
    device_nodes: tuple[_Node, ...] | None = None


class _Device(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    container_edits: _Edits = _Edits()


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    kind: str
    devices: tuple[_Device, ...] = ()
    container_edits: _Edits = _Edits()


class _Described(NamedTuple):
    file: Path
    nodes: tuple[str, ...]


def names_in(annotations: Mapping[str, str]) -> list[str]:
    """The devices that annotations ask for."""
    lists = (value for key, value in annotations.items() if key.startswith(ANNOTATION_PREFIX))
    return [name for value in lists for name in map(str.strip, value.split(",")) if name]


class Registry:
    """What the host's files describe at this moment."""

    def __init__(self, folders: Sequence[Path] = FOLDERS) -> None:
        self._folders = folders
        self._known: dict[str, _Described] = {}
        self._ambiguous: dict[str, tuple[Path, Path]] = {}
        self._broken: list[Path] = []
        for folder in folders:
            self._read(folder)

    def knows(self, name: str) -> bool:
        return name in self._known or name in self._ambiguous

    def files_of(self, name: str) -> tuple[str, ...]:
        """The host's device files that a device brings. Raises DevicesUnknown."""
        if name in self._ambiguous:
            one, other = self._ambiguous[name]
            raise DevicesUnknown(f"CDI device {name} is described twice, by {one} and by {other}; remove one")
        if name not in self._known:
            places = ", ".join(map(str, self._folders))
            broken = f" ({', '.join(map(str, self._broken))} cannot be read)" if self._broken else ""
            raise DevicesUnknown(
                f"CDI device {name}: no file in {places} describes it{broken}; write one with the tool of its vendor, "
                "or remove the annotation"
            )
        return self._known[name].nodes

    def _read(self, folder: Path) -> None:
        here: dict[str, _Described] = {}
        twice: dict[str, tuple[Path, Path]] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.suffix not in _SUFFIXES:
                continue
            for name, nodes in self._described_in(file):
                if name in here:
                    twice[name] = (here[name].file, file)
                here[name] = _Described(file, nodes)
        for name, described in here.items():
            self._known[name] = described
            self._ambiguous.pop(name, None)
        self._ambiguous |= twice

    def _described_in(self, file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
        decode = msgspec.json.decode if file.suffix == ".json" else msgspec.yaml.decode
        try:
            spec = decode(file.read_bytes(), type=_Spec)
        except (OSError, msgspec.MsgspecError) as err:
            log.warning("cdi_file_unusable", file=str(file), error=" ".join(str(err).split()))
            self._broken.append(file)
            return
        shared = _nodes(spec.container_edits)
        for device in spec.devices:
            yield f"{spec.kind}={device.name}", tuple(_unique((*_nodes(device.container_edits), *shared)))


def _nodes(edits: _Edits) -> tuple[str, ...]:
    return tuple(node.host_path or node.path for node in edits.device_nodes or ())


def _unique(values: Iterable[str]) -> Iterator[str]:
    yield from dict.fromkeys(values)

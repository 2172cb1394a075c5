"""Builds the container image of the demo and the tests out of the distribution's static busybox.

The output is an OCI image layout in a tar archive, which `ctr images import` and its relatives read. It is
written file by file: no container engine, no root, no downloads, and the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BUSYBOX = Path("/bin/busybox")
PASSWD = """\
root:x:0:0:root:/root:/bin/sh
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
"""
GROUP = """\
root:x:0:
user:x:1000:
extra:x:2000:user
nogroup:x:65534:
"""
# GOARCH names, which OCI uses, of what the kernel calls its machines.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "s390x": "s390x"}


@dataclass(frozen=True, kw_only=True)
class Image:
    """What one image is called and what it runs; the files are the same in all."""

    name: str
    command: tuple[str, ...]


NAME = "kata-py.local/busybox:latest"
SHELL = Image(name=NAME, command=("/bin/sh",))
# What Kubernetes' interface keeps a pod alive with: it collects orphans, and ends when it is told to.
PAUSE = Image(
    name="kata-py.local/pause:latest",
    command=("/bin/sh", "-c", "trap 'exit 0' INT TERM; while :; do sleep 2147483647 & wait; done"),
)


@dataclass(frozen=True)
class Owner:
    """Numeric owner of a file in the image."""

    uid: int = 0
    gid: int = 0


ROOT = Owner()
USER = Owner(1000, 1000)


class Layer:
    """One file system layer as a tar archive in memory, with every time stamp zero."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    def _add(self, info: tarfile.TarInfo, mode: int, owner: Owner, content: bytes = b"") -> None:
        info.mode, info.uid, info.gid = mode, owner.uid, owner.gid
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))

    def folder(self, name: str, mode: int = 0o755, owner: Owner = ROOT) -> None:
        """Adds a directory; parents come first."""
        info = tarfile.TarInfo(name)
        info.type = tarfile.DIRTYPE
        self._add(info, mode, owner)

    def file(self, name: str, content: bytes, mode: int = 0o644, owner: Owner = ROOT) -> None:
        """Adds a regular file."""
        self._add(tarfile.TarInfo(name), mode, owner, content)

    def link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        self._add(info, 0o777, ROOT)

    def content(self) -> bytes:
        """The finished archive."""
        self._tar.close()
        return self._buffer.getvalue()


def applets(busybox: Path) -> list[str]:
    """Names that this busybox answers to, itself left out."""
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    return sorted(set(listed) - {"busybox"})


def root_layer(busybox: Path, names: Sequence[str]) -> bytes:
    """The whole root file system: busybox, a link for each applet, users, and the usual folders."""
    layer = Layer()
    for folder in (
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "proc",
        "sys",
        "run",
        "usr",
        "usr/bin",
        "var",
        "var/log",
    ):
        layer.folder(folder)
    layer.folder("root", 0o700)
    layer.folder("tmp", 0o1777)
    layer.folder("var/tmp", 0o1777)
    layer.folder("home/user", 0o755, USER)
    layer.file("bin/busybox", busybox.read_bytes(), 0o755)
    for name in names:
        layer.link(f"bin/{name}", "busybox")
    layer.link("sbin", "bin")
    # Scripts commonly start with this one.
    layer.link("usr/bin/env", "../../bin/busybox")
    layer.file("etc/passwd", PASSWD.encode())
    layer.file("etc/group", GROUP.encode())
    layer.file("etc/hosts", b"127.0.0.1 localhost\n")
    return layer.content()


def as_json(value: object) -> bytes:
    """Stable bytes: they are named by their digest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    """How OCI documents refer to a blob."""
    digest = hashlib.sha256(blob).hexdigest()
    return {
        "mediaType": f"application/vnd.oci.image.{media_type}",
        "digest": f"sha256:{digest}",
        "size": len(blob),
    }


def image_layout(*layers: bytes, architecture: str, image: Image = SHELL) -> dict[str, bytes]:
    """All files of the OCI layout (image-spec 1.0) by path, for one image with these uncompressed layers."""
    described = [descriptor("layer.v1.tar", layer) for layer in layers]
    config = as_json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": image.command, "WorkingDir": "/"},
            # The layers are not compressed, so their digests are those of their content.
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in described]},
            "history": [{"created_by": "kata-py busybox_image"}] * len(layers),
        }
    )
    manifest = as_json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", config),
            "layers": described,
        }
    )
    entry = descriptor("manifest.v1+json", manifest)
    entry["platform"] = {"architecture": architecture, "os": "linux"}
    entry["annotations"] = {
        # The first is containerd's full name, the second what other tools call the image in this archive.
        "io.containerd.image.name": image.name,
        "org.opencontainers.image.ref.name": image.name.rpartition(":")[2],
    }
    files = {"oci-layout": as_json({"imageLayoutVersion": "1.0.0"})}
    for blob in (*layers, config, manifest):
        files[f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"] = blob
    files["index.json"] = as_json({"schemaVersion": 2, "manifests": [entry]})
    return files


def build(
    output: Path,
    *,
    busybox: Path = BUSYBOX,
    image: Image = SHELL,
    architecture: str = "",
    names: Sequence[str] | None = None,
    more: Sequence[bytes] = (),
) -> None:
    """Writes the archive in one step. Raises OSError when busybox is missing.

    `more` are the archives of layers above the one with busybox. With an `architecture` busybox may be one that this
    machine cannot run: the applets' `names` are then given, too.
    """
    architecture = architecture or ARCHITECTURES.get(platform.machine(), platform.machine())
    layer = root_layer(busybox, applets(busybox) if names is None else names)
    files = image_layout(layer, *more, architecture=architecture, image=image)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.new")
    with tarfile.open(unfinished, "w") as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    os.replace(unfinished, output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the busybox image as an OCI archive.")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    build(options.output)
    print(f"image: {NAME} in {options.output}, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

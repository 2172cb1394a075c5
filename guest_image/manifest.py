"""What a built image consists of, readable by people and by the code that decides whether to build again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from guest_image.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "manifest.json"
VMLINUX, INITRD = "vmlinux", "initrd.img"
IMAGE, IMAGE_INITRD = "rootfs.img", "image-initrd.img"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written beside the image as manifest.json. Sizes are bytes, digests are SHA-256 in hexadecimal."""

    agent_version: str
    arch: str
    kernel_release: str
    python_version: str
    protobuf_version: str
    packages: dict[str, str]
    """Debian packages that files were taken from, with their versions."""
    kernel_modules: list[str]
    python_modules: int
    parts: dict[str, int]
    """Bytes in the initrd by kind of content."""
    files: int
    files_sha256: str
    """Digest over path, mode and contents of every file in the initrd."""
    vmlinux_bytes: int
    initrd_bytes: int
    inputs_sha256: str
    """Digest over everything the build read that is not a package: sources, options, versions."""
    notes: list[str] = field(default_factory=list)
    rootfs_type: str = ""
    """File system of the root image; empty when none was built."""
    image_bytes: int = 0
    image_initrd_bytes: int = 0
    kernel_verity_params: str = ""
    """What the root image is checked with; empty when it has no hashes."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ImageError when the file is missing or is not a manifest of this version of the builder."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as err:
            raise ImageError(f"{path} is not a usable manifest: {err}") from err

    def sizes(self) -> dict[str, int]:
        """The files that were built, with their sizes."""
        files = {VMLINUX: self.vmlinux_bytes, INITRD: self.initrd_bytes}
        if self.rootfs_type:
            files |= {IMAGE: self.image_bytes, IMAGE_INITRD: self.image_initrd_bytes}
        return files

    def image_configuration(self, folder: Path) -> str:
        """What boots the root image in `folder`, as lines of `[hypervisor.qemu]`; nothing when there is none."""
        if not self.rootfs_type:
            return ""
        words = {
            "kernel": str(folder / VMLINUX),
            "image": str(folder / IMAGE),
            "image_initrd": str(folder / IMAGE_INITRD),
            "rootfs_type": self.rootfs_type,
            "kernel_verity_params": self.kernel_verity_params,
        }
        return "\n".join(f"{key} = {json.dumps(value)}" for key, value in words.items() if value)

    def __str__(self) -> str:
        versions = (
            f"kernel {self.kernel_release}, Python {self.python_version}, protobuf {self.protobuf_version}"
        )
        counts = f"({self.files} files, {self.python_modules} Python modules)"
        lines = [
            f"agent {self.agent_version} on {self.arch}, {versions}",
            f"vmlinux {self.vmlinux_bytes / 1e6:.1f} MB, initrd {self.initrd_bytes / 1e6:.1f} MB {counts}",
        ]
        if self.rootfs_type:
            checked = (
                f", checked with dm-verity: {self.kernel_verity_params}" if self.kernel_verity_params else ""
            )
            lines.append(f"root image {self.image_bytes / 1e6:.1f} MB, {self.rootfs_type}{checked}")
        lines += [
            f"  {size / 1e6:6.2f} MB  {part}"
            for part, size in sorted(self.parts.items(), key=lambda p: -p[1])
        ]
        lines.append("kernel modules: " + " ".join(self.kernel_modules))
        lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in self.packages.items()))
        return "\n".join(lines + self.notes)

"""`kata-py guest`: the guest builder with progress for people, and a summary of what it made."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from cli import output
from guest_image import ImageError, Manifest
from guest_image import build as build_image

if TYPE_CHECKING:
    from guest_image.file_systems import FileSystem

# Debian's names for what the kernel calls its machines.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "s390x": "s390x"}
SYSTEM_FOLDER = Path("/usr/share/kata-py")
MANIFEST = "manifest.json"


def host_architecture() -> str:
    """That of this machine."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def default_folder(arch: str) -> Path:
    """Where the configuration expects the guest; for users who may not write there, a folder of their own.

    Guests of other architectures than the host's have folders of their own in it.
    """
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    folder = SYSTEM_FOLDER if os.geteuid() == 0 else base / "kata-py" / "guest"
    return folder if arch == host_architecture() else folder / arch


def build(
    folder: Path | None, *, arch: str | None, suite: str | None, image: FileSystem | None, verity: bool
) -> None:
    """Builds a guest and tells about it; exits with status 1 and one line when that is not possible."""
    arch = arch or host_architecture()
    folder = folder or default_folder(arch)
    out = output.console()
    try:
        with output.steps(out) as announce:
            manifest = build_image(
                folder,
                arch=arch,
                progress=announce,
                suite=suite,
                image=image,
                verity=verity,
            )
    except (ImageError, OSError) as error:
        output.fail(str(error))
        raise typer.Exit(1) from None
    out.print(f"guest: {summary(manifest)} in {folder}")
    if image is not None:
        lines = f"for [hypervisor.qemu]:\n{manifest.image_configuration(folder.absolute())}"
        out.print(Text(lines), soft_wrap=True)  # to be copied into a file, so no line may be broken


def info(folder: Path) -> None:
    """Prints the whole manifest; exits with status 1 when there is none."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except ImageError as error:
        output.fail(f"{error}; `kata-py guest build --output {folder}` makes a guest there")
        raise typer.Exit(1) from None
    output.console().print(Text(str(manifest)))


def summary(manifest: Manifest) -> str:
    """A guest in one line."""
    root = (
        f", {manifest.rootfs_type} image {manifest.image_bytes / 1e6:.0f} MB" if manifest.rootfs_type else ""
    )
    return (
        f"{manifest.arch} kernel {manifest.kernel_release} ({manifest.vmlinux_bytes / 1e6:.0f} MB),"
        f" initrd {manifest.initrd_bytes / 1e6:.0f} MB{root} with agent {manifest.agent_version}"
        f" on Python {manifest.python_version}"
    )

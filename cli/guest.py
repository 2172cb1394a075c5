"""`kata-py guest`: the guest builder with progress for people, and a summary of what it made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import typer
from rich.text import Text

from cli import output
from guest_image import ImageError, Manifest
from guest_image import build as build_image

# Debian's names for what the kernel calls its machines.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "s390x": "s390x"}
SYSTEM_FOLDER = Path("/usr/share/kata-py")
MANIFEST = "manifest.json"


def default_folder() -> Path:
    """Where the configuration expects the guest; for users who may not write there, a folder of their own."""
    if os.geteuid() == 0:
        return SYSTEM_FOLDER
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "kata-py" / "guest"


def build(folder: Path | None, *, arch: str | None, suite: str | None) -> None:
    """Builds a guest and tells about it; exits with status 1 and one line when that is not possible."""
    folder = folder or default_folder()
    out = output.console()
    try:
        with output.steps(out) as announce:
            manifest = build_image(
                folder,
                arch=arch or ARCHITECTURES.get(platform.machine(), platform.machine()),
                progress=announce,
                suite=suite,
            )
    except (ImageError, OSError) as error:
        output.fail(str(error))
        raise typer.Exit(1) from None
    out.print(f"guest: {summary(manifest)} in {folder}")


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
    return (
        f"{manifest.arch} kernel {manifest.kernel_release} ({manifest.vmlinux_bytes / 1e6:.0f} MB),"
        f" initrd {manifest.initrd_bytes / 1e6:.0f} MB with agent {manifest.agent_version}"
        f" on Python {manifest.python_version}"
    )

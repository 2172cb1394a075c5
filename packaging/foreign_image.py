"""Builds the tests' container image for another architecture, out of Debian's static busybox for that.

    .venv/bin/python packaging/foreign_image.py ARCH FOLDER

ARCH is Debian's name of the architecture, which is containerd's as well. FOLDER gets the image, `busybox.tar`, and
the program itself, `busybox`. The package comes through an apt state of its own and is only unpacked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import busybox_image

from guest_image.apt import Apt
from guest_image.errors import ImageError
from guest_image.tools import LOADERS

CACHE = Path(__file__).resolve().parent.parent / "build" / "cache" / "busybox"
PACKAGE = "busybox-static"


def image(arch: str) -> busybox_image.Image:
    """The image of one architecture; the files are those of the host's."""
    return busybox_image.Image(name=f"kata-py.local/busybox-{arch}:latest", command=("/bin/sh",))


def build(arch: str, folder: Path) -> None:
    """Writes both files. Raises ImageError when neither the mirror nor the cache has the package."""
    apt = Apt(CACHE / arch, arch=arch, suite=None)
    apt.refresh(say)
    root = apt.unpack("busybox", apt.alone([PACKAGE]), say)
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "busybox"
    shutil.copy(root.find("usr/bin/busybox", "bin/busybox"), program)
    busybox_image.build(
        folder / "busybox.tar",
        busybox=program,
        image=image(arch),
        architecture=arch,
        # Those of the host's, which is built from the same sources and can be asked.
        names=busybox_image.applets(busybox_image.BUSYBOX),
    )


def say(text: str) -> None:
    """One line of progress."""
    print(f"image: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the busybox image of another architecture.")
    parser.add_argument("arch", choices=sorted(LOADERS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        build(options.arch, options.folder)
    except ImageError as err:
        sys.exit(f"image: {err}")
    say(f"{image(options.arch).name} in {options.folder}")


if __name__ == "__main__":
    main()

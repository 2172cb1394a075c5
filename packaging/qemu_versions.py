"""Makes the QEMUs of other Debian releases and for other architectures available, without installing them.

    .venv/bin/python packaging/qemu_versions.py fetch [SUITE...]

Prints one line for each program: Debian's suite, the guests' architecture, the program. They come as packages
from the host's mirror, through an apt state of their own below build/, and are only unpacked; of that is kept what a
QEMU needs to run (150 MB for a suite). A program is a two-line script that starts QEMU with its own C library,
modules and data files. tests/unit/hypervisor compares what we emit with whatever is there, and with the host's own
QEMU, which is why the host's own suite is not fetched unless it is named.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guest_image.apt import Apt
from guest_image.errors import ImageError, ToolFailed
from guest_image.tools import LOADERS, host_arch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guest_image.apt import Package
    from guest_image.tools import Root

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cache" / "debian"  # one for each suite, which containerd_versions.py uses too
SUITES = ("bookworm", "trixie", "sid")
# Guests' architecture as `uname -m` says it, and the packages that may have its emulator: s390x got one of its
# own after Debian 12.
PACKAGES = {
    "x86_64": ("qemu-system-x86",),
    "aarch64": ("qemu-system-arm",),
    "s390x": ("qemu-system-s390x", "qemu-system-misc"),
}
# Where QEMU of Debian looks for firmware and the like.
DATA = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


class QemuError(Exception):
    """A QEMU cannot be fetched; the text is one line with the reason."""


def say(text: str) -> None:
    """One line of progress; stdout is for the programs."""
    print(f"qemu versions: {text}", file=sys.stderr, flush=True)


def hosts_own() -> str | None:
    """The suite that the host is, whose QEMUs `make setup` installs."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME")
    except OSError:
        return None


def fetched(suite: str, cache: Path = CACHE) -> Iterator[tuple[str, Path]]:
    """Architecture and program for each emulator of one suite, unpacked once per set of versions.

    Raises:
        QemuError: neither the mirror nor the cache has it.
    """
    cache = cache.resolve()  # the scripts hold absolute paths
    programs = {arch: cache / suite / f"qemu-system-{arch}" for arch in PACKAGES}
    try:
        apt = Apt(cache / suite, arch=host_arch(), suite=suite)

        def choose() -> Sequence[Package]:
            return apt.closure(sorted(packaged(apt, names) for names in PACKAGES.values()))

        root = apt.newest("qemu", choose, say)
        done = root.path / "programs-made"
        if not done.exists():
            for arch, path in programs.items():
                launcher(root, arch, path)
            done.touch()
            keep_what_runs(root, done)
            apt.forget_packages()
    except ImageError as err:
        reason = err.said[0] if isinstance(err, ToolFailed) else err
        raise QemuError(f"cannot get QEMU of Debian {suite}: {reason}") from err
    yield from programs.items()


def keep_what_runs(root: Root, *others: Path) -> None:
    """Remove all but libraries, QEMU's modules, its data, and `others`."""
    kept = {*others, *(root.path / place for place in DATA)}
    for folder in {each.resolve() for each in root.library_dirs() if each.is_dir()}:
        kept |= {path for path in folder.iterdir() if path.name == "qemu" or not path.is_dir()}
    _keep(root.path, kept)


def _keep(folder: Path, kept: set[Path]) -> None:
    for path in folder.iterdir():
        if path in kept or path.is_symlink():
            continue  # a link costs nothing, and may lead to what is kept
        if any(other.is_relative_to(path) for other in kept):
            _keep(path, kept)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def packaged(apt: Apt, names: Sequence[str]) -> str:
    """The first of the names that this suite has with files in it, and not as a name for another package."""
    for name in names[:-1]:
        try:
            if any(package.name == name for package in apt.closure([name])):
                return name
        except ToolFailed:
            continue
    return names[-1]


def launcher(root: Root, arch: str, path: Path) -> Path:
    """A script at `path` that starts the emulator with nothing of the host's."""
    original = root.find(f"usr/bin/qemu-system-{arch}")
    modules = next((folder for each in root.library_dirs() if (folder := each / "qemu").is_dir()), root.path)
    # A module that is not in QEMU_MODULE_DIR is looked for in the host's folder, and one of another version ends
    # QEMU. So the copy that runs has a folder that does not exist in its place.
    hosts = f"/usr/lib/{LOADERS[root.arch][0]}-linux-gnu/qemu\0".encode()
    program = path.with_suffix(".program")
    program.write_bytes(original.read_bytes().replace(hosts, b"/" + b"-" * (len(hosts) - 2) + b"\0"))
    libraries = ":".join(str(directory) for directory in root.library_dirs())
    data = [word for place in DATA for word in ("-L", root.path / place)]
    words = shlex.join(str(word) for word in (root.loader(), "--library-path", libraries, program, *data))
    path.write_text(f'#!/bin/sh\nQEMU_MODULE_DIR={shlex.quote(str(modules))} exec {words} "$@"\n')
    path.chmod(0o755)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the QEMUs of Debian's suites.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetch = verbs.add_parser("fetch", help="make the programs available, and print where they are")
    fetch.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; none is all but the host's own"
    )
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    try:
        for suite in options.suites or [each for each in SUITES if each != hosts_own()]:
            for arch, program in fetched(suite):
                print(suite, arch, program)
    except QemuError as err:
        sys.exit(f"qemu versions: {err}")


if __name__ == "__main__":
    main()

"""Running the distribution's programs, and programs out of an unpacked root without installing them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_image.errors import ImageError, ToolFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Debian's name of an architecture, the kernel's name of it, and the dynamic loader of its C library.
LOADERS = {
    "amd64": ("x86_64", "ld-linux-x86-64.so.2"),
    "arm64": ("aarch64", "ld-linux-aarch64.so.1"),
    "s390x": ("s390x", "ld64.so.1"),
}


def host_arch() -> str:
    """Debian's name of the machine we run on. Raises ImageError when it is not one we build for."""
    machine = platform.machine()
    for arch, (kernel_name, _loader) in LOADERS.items():
        if machine == kernel_name:
            return arch
    raise ImageError(f"guest images cannot be built on {machine}: known are {', '.join(LOADERS)}")


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    data: bytes | None = None,
    cwd: Path | None = None,
) -> bytes:
    """Run a program to its end and return its stdout. Raises ToolFailed with its last line of stderr."""
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            command,
            input=data,
            stdin=None if data is not None else subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as err:
        raise ToolFailed(f"{command[0]} is not installed, and the guest image is made with it") from err
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ToolFailed(
            f"{shlex.join(command)} failed with status {done.returncode}: {said[-1]}", tuple(said)
        )
    return done.stdout


@dataclass(frozen=True)
class Root:
    """Packages unpacked side by side into one directory. Nothing of it is installed."""

    path: Path
    arch: str
    owners: Mapping[str, str]
    """Package name by path relative to the root."""

    def library_dirs(self) -> list[Path]:
        """Where the packages keep shared libraries, with and without the merged /usr."""
        triplet = f"{LOADERS[self.arch][0]}-linux-gnu"
        names = (f"usr/lib/{triplet}", f"lib/{triplet}", "usr/lib64", "lib64", "usr/lib", "lib")
        return [self.path / name for name in names]

    def find(self, *candidates: str) -> Path:
        """The first of the paths that exists under the root. Raises ImageError naming them."""
        for candidate in candidates:
            path = self.path / candidate.lstrip("/")
            if path.exists():
                return path
        raise ImageError(f"none of the unpacked packages has {' or '.join(candidates)}")

    def owner(self, path: Path) -> str | None:
        """Name of the package that brought a file; None for a file that is not under the root."""
        if not path.is_relative_to(self.path):
            return None
        return self.owners.get(str(path.relative_to(self.path)))

    def loader(self) -> Path:
        """The dynamic loader, wherever the packages put it."""
        name = LOADERS[self.arch][1]
        for directory in self.library_dirs():
            if (directory / name).is_file():
                return directory / name
        raise ImageError(f"the C library's package has no {name}")

    def run(
        self,
        program: Path,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> bytes:
        """Run one of the root's programs with the root's own C library. Raises ToolFailed."""
        path = ":".join(str(directory) for directory in self.library_dirs())
        return run([self.loader(), "--library-path", path, program, *args], env=env, data=data)

"""Shared libraries for a guest of another architecture than this machine.

Bytecode is the same everywhere, so modules are chosen and compiled with this machine's interpreter; what is machine
code is then taken from the guest's packages, and protobuf's part from the wheel that its authors publish.
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING

import google.protobuf

from guest_image.errors import ImageError
from guest_image.tools import LOADERS, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guest_image.python_set import Extension, ModuleSet
    from guest_image.tools import Root

_UPB = "google._upb._message"
_UPB_FILE = "google/_upb/_message.abi3.so"


def for_architecture(
    modules: ModuleSet, root: Root, python_name: str, cache: Path, progress: Callable[[str], None]
) -> ModuleSet:
    """The same modules with the extensions of the guest's architecture. Raises ImageError."""

    def counterpart(extension: Extension) -> Extension:
        if extension.name == _UPB:
            return replace(extension, path=_protobuf_extension(root.arch, cache, progress))
        directory = root.path / "usr/lib" / python_name / "lib-dynload"
        found = sorted(directory.glob(f"{extension.name}.*.so"))
        if len(found) != 1:
            raise ImageError(f"the guest's {python_name} has no extension module {extension.name}")
        return replace(extension, path=found[0])

    return replace(modules, extensions=tuple(counterpart(extension) for extension in modules.extensions))


def _protobuf_extension(arch: str, cache: Path, progress: Callable[[str], None]) -> Path:
    version = google.protobuf.__version__
    target = cache / f"protobuf-{version}"
    extension = target / _UPB_FILE
    if not extension.exists():
        progress(f"downloading protobuf {version} for {arch}")
        wheels = target / "wheels"
        platform = f"manylinux2014_{LOADERS[arch][0]}"
        words = ["--no-deps", "--only-binary=:all:", "--platform", platform, "--dest", str(wheels)]
        run([sys.executable, "-m", "pip", "download", "--quiet", *words, f"protobuf=={version}"])
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_UPB_FILE, target)
    return extension

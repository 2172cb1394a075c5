"""A copy of kata-py and what it imports, as an installation has them, to be replaced or removed under its daemons."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from launcher import SHIM_SOURCE, render, write

import shim

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("netlink", "oci_engine", "ttrpc", "config", "agent_proto", "hypervisor", "shim")
DEPENDENCIES = ("google", "msgspec", "qemu", "structlog")


class Installation:
    """Files in `library`, started by `program`; `source` is the launcher's text for `launcher.render`."""

    def __init__(self, library: Path, program: Path, *, source: str = SHIM_SOURCE) -> None:
        self.library = library
        self.program = program
        self._source = source
        self._copy_to(library)
        write(program, render(source, python=Path(sys.executable), folders=[library]))

    def _copy_to(self, folder: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        places = dict.fromkeys(PACKAGES, REPOSITORY)
        places |= dict.fromkeys(DEPENDENCIES, Path(sysconfig.get_path("purelib")))
        for name, place in places.items():
            shutil.copytree(place / name, folder / name, ignore=ignored)

    def remove(self) -> None:
        """Leave nothing of it."""
        shutil.rmtree(self.library)
        self.program.unlink()

    def replace(self, version: str) -> None:
        """Put another version in its place, as `make install` does: files are exchanged, never written to."""
        fresh, old = self.library.with_name("fresh"), self.library.with_name("old")
        self._copy_to(fresh)
        module = fresh / "shim" / "__init__.py"
        module.write_text(module.read_text().replace(shim.VERSION, version))
        self.library.rename(old)
        fresh.rename(self.library)
        shutil.rmtree(old)
        self.program.unlink()
        write(self.program, render(self._source, python=Path(sys.executable), folders=[self.library]))

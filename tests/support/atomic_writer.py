"""ConfigMaps and Secrets on the host, changed as a kubelet changes them."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class AtomicWriter:
    """One volume: the visible names are links through `..data`, which is a link to the directory of one version and is
    replaced by a rename."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._versions = 0

    def write(self, files: Mapping[str, str]) -> None:
        """Make these the files, all of them at once."""
        self._versions += 1
        version = self.folder / f"..2026_01_02_{self._versions:02}"
        old = self.folder / os.readlink(self.folder / "..data") if self._versions > 1 else None
        version.mkdir(mode=0o755)
        for name, text in files.items():
            (version / name).write_text(text)
        (self.folder / "..data_tmp").symlink_to(version.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        for path in list(self.folder.iterdir()):
            if not path.name.startswith("..") and path.name not in files:
                path.unlink()
        if old is not None:
            shutil.rmtree(old)

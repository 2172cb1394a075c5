"""A container that cannot be made."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING

import pytest

from oci_engine import making
from oci_engine.cgroups.none import NoCgroup
from oci_engine.errors import SetupFailed
from oci_engine.options import CreateOptions
from oci_engine.state import Store

if TYPE_CHECKING:
    from pathlib import Path


def test_nobody_else_has_it_before_it_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(NoCgroup):
        def create(self) -> None:
            raise SetupFailed("broken")

    def seen(_cgroup: object) -> None:
        folder = os.open(store.folder("c1"), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        looked.append(True)

    store, looked = Store(str(tmp_path / "run")), list[bool]()
    monkeypatch.setattr(making, "find_cgroup", lambda *_, **__: Broken())
    monkeypatch.setattr(making, "remove_cgroup", seen)
    (tmp_path / "rootfs").mkdir()
    document = {
        "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["sh"], "cwd": "/"},
        "linux": {"namespaces": [{"type": "mount"}]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(SetupFailed, match="broken"):
        making.create(store, "c1", str(tmp_path), CreateOptions(), lambda _pid: 0, lambda _text: None)
    assert looked == [True]
    assert store.ids() == []

"""What `make run` keeps between runs, and what it reads from the shim's log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import demo
import pytest
from private_containerd import PrivateContainerd

if TYPE_CHECKING:
    from pathlib import Path

LOG = """\
time="2026-01-01T00:00:00Z" level=info msg="an \\"odd\\" line that isn't closed id=x
timestamp=2026-01-01T00:00:01Z level=info msg=sandbox_up spawned_s=9.0 sandbox=old
timestamp=2026-01-01T00:00:02Z level=info msg=sandbox_up agent_s=3.9 sandbox_s=4.0 spawned_s=0.2 init_s=2.5 sandbox=new
timestamp=2026-01-01T00:00:03Z level=info msg=process_exited status=0
"""


class Images(PrivateContainerd):
    """A containerd that only notes what is imported."""

    def snapshotter(self) -> str:
        return "native"

    def import_image(self, archive: Path, *, snapshotter: str, namespace: str = "default") -> None:
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{archive.name} {snapshotter}\n")


def test_moments_of_the_last_start_in_order() -> None:
    assert list(demo.moments(LOG).items()) == [("spawned", 0.2), ("agent", 3.9), ("sandbox", 4.0)]


@pytest.mark.parametrize("log", ["", "nothing of interest\n", 'msg=other a="b c"\n'])
def test_no_moments(log: str) -> None:
    assert demo.moments(log) == {}


def test_image_is_imported_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(b"one")
    monkeypatch.setattr(demo, "IMAGE", archive)
    server = Images(folder=tmp_path)
    assert demo.import_image(server) == ("imported for native", "native")
    assert demo.import_image(server) == ("already imported", "native")
    archive.write_bytes(b"three")
    assert demo.import_image(server)[0] == "imported for native"
    assert (tmp_path / "calls").read_text() == "image.tar native\n" * 2


def test_equal_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    demo.write_if_changed(path, "text")
    os.utime(path, ns=(1, 1))
    demo.write_if_changed(path, "text")
    assert path.stat().st_mtime_ns == 1
    demo.write_if_changed(path, "other")
    assert path.read_text() == "other"

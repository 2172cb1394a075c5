"""The image for another architecture: the host's files with another program, under that platform."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING

import busybox_image
import foreign_image

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class FakeRoot:
    """An unpacked package."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def find(self, *candidates: str) -> Path:
        assert "bin/busybox" in candidates
        return self._program


def test_program_and_platform_are_of_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "downloaded"
    program.write_bytes(b"not for this machine")
    program.chmod(0o755)
    asked: list[object] = []

    class FakeApt:
        def __init__(self, directory: Path, *, arch: str, suite: str | None) -> None:
            asked.append((arch, suite))

        def refresh(self, progress: object) -> None: ...

        def alone(self, names: list[str]) -> list[str]:
            return names

        def unpack(self, kind: str, packages: list[str], progress: object) -> FakeRoot:
            asked.append(packages)
            return FakeRoot(program)

    monkeypatch.setattr(foreign_image, "Apt", FakeApt)
    monkeypatch.setattr(busybox_image, "applets", lambda _: ["sh"])
    foreign_image.build("s390x", tmp_path / "out")
    assert asked == [("s390x", None), ["busybox-static"]]
    assert (tmp_path / "out" / "busybox").read_bytes() == b"not for this machine"
    with tarfile.open(tmp_path / "out" / "busybox.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["platform"] == {"architecture": "s390x", "os": "linux"}
    assert entry["annotations"]["io.containerd.image.name"] == "kata-py.local/busybox-s390x:latest"
    layer = max(files.values(), key=len)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert tar.extractfile("bin/busybox").read() == b"not for this machine"  # type: ignore[union-attr]
        assert tar.getmember("bin/sh").linkname == "busybox"

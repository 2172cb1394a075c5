"""`kata-py direct-volume`: what it writes is what the shim reads."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from cli import direct_volume
from cli.main import app
from shim import disk_needs

if TYPE_CHECKING:
    from pathlib import Path

INFO = json.dumps({"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "options": []})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared" / "direct-volumes"
    for module in (disk_needs, direct_volume):
        monkeypatch.setattr(module, "DIRECT_VOLUMES", str(folder))
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["direct-volume", *arguments])
    return result.exit_code, result.output


def test_a_description_comes_and_goes(place: Path) -> None:
    path = "/var/lib/kubelet/pods/1/volumes/v"
    for info in (INFO, INFO.replace("ext4", "xfs")):
        assert run("add", "--volume-path", path, "--mount-info", info) == (0, "")
        found = disk_needs._mount_info(path)
        assert found is not None
        assert (found.device, found.fstype) == ("/dev/sdf", json.loads(info)["fstype"])
    assert [len(files) for _, _, files in os.walk(place)] == [0, 1]
    assert run("add", "--volume-path", "/other", "--mount-info", INFO) == (0, "")
    for _ in range(2):
        assert run("remove", "--volume-path", path) == (0, "")
    assert disk_needs._mount_info(path) is None
    assert place.exists()
    assert run("remove", "--volume-path", "/other") == (0, "")
    assert not place.exists()


@pytest.mark.parametrize(
    ("path", "info", "message"),
    [
        ("relative", INFO, "--volume-path 'relative' is not an absolute path"),
        ("/x", "{", "--mount-info is no description of a volume: "),
        ("/x", "{}", "missing required field `volume-type`"),
        ("/x", INFO.replace("/dev/sdf", "sdf"), "device 'sdf' is not an absolute path"),
    ],
)
def test_what_is_refused(place: Path, path: str, info: str, message: str) -> None:
    status, said = run("add", "--volume-path", path, "--mount-info", info)
    assert status == 1
    assert message in said
    assert len(said.splitlines()) == 1
    assert not place.exists()

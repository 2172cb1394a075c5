"""Names of devices (CDI), and the files of the host that they stand for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from shim.cdi import Registry, names_in
from shim.errors import DevicesUnknown

if TYPE_CHECKING:
    from pathlib import Path

YAML = """\
cdiVersion: 0.5.0
kind: vendor.com/gpu
containerEdits:
  deviceNodes:
    - path: /dev/vfio/vfio
  hooks: null
devices:
  - name: "0"
    containerEdits:
      env: [A=B]
      deviceNodes:
        - {path: /dev/vfio/12, type: c, major: 240, minor: 0, permissions: rwm}
  - name: part-1
    containerEdits:
      deviceNodes:
        - path: /dev/gpu
          hostPath: /dev/vfio/40
  - name: none
    containerEdits: {}
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
    return tmp_path / "etc", tmp_path / "run"


def described(kind: str, **devices: str) -> str:
    spec: dict[str, Any] = {"cdiVersion": "0.6.0", "kind": kind, "devices": []}
    for name, path in devices.items():
        spec["devices"].append({"name": name, "containerEdits": {"deviceNodes": [{"path": path}]}})
    return json.dumps(spec)


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_files_of_yaml(folders: tuple[Path, Path], suffix: str) -> None:
    (folders[0] / f"vendor.{suffix}").write_text(YAML)
    (folders[0] / "README").write_text("no description")
    registry = Registry(folders)
    assert registry.files_of("vendor.com/gpu=0") == ("/dev/vfio/12", "/dev/vfio/vfio")
    assert registry.files_of("vendor.com/gpu=part-1") == ("/dev/vfio/40", "/dev/vfio/vfio")
    assert registry.files_of("vendor.com/gpu=none") == ("/dev/vfio/vfio",)
    assert not registry.knows("vendor.com/gpu=1")


def test_files_of_json_and_which_folder_wins(folders: tuple[Path, Path]) -> None:
    etc, run = folders
    (etc / "a.json").write_text(described("v.com/a", x="/dev/vfio/1", y="/dev/vfio/2"))
    (etc / "b.json").write_text(described("v.com/a", y="/dev/vfio/3", z="/dev/vfio/4"))
    (run / "c.json").write_text(described("v.com/a", x="/dev/vfio/5"))
    registry = Registry(folders)
    assert registry.files_of("v.com/a=x") == ("/dev/vfio/5",)
    assert registry.files_of("v.com/a=z") == ("/dev/vfio/4",)
    with pytest.raises(
        DevicesUnknown, match=rf"^CDI device v.com/a=y is described twice, by {etc}/a.json and by"
    ):
        registry.files_of("v.com/a=y")
    (run / "d.json").write_text(described("v.com/a", y="/dev/vfio/6"))
    assert Registry(folders).files_of("v.com/a=y") == ("/dev/vfio/6",)


@pytest.mark.parametrize("text", ["", "{", "[]", "kind: 1\n", "kind: a/b\ndevices: x\n", "a: [\n"])
def test_what_cannot_be_read_is_left_out_and_told(folders: tuple[Path, Path], text: str) -> None:
    (folders[0] / "bad.yaml").write_text(text)
    (folders[0] / "good.json").write_text(described("v.com/a", x="/dev/vfio/1"))
    with capture_logs() as logs:
        registry = Registry(folders)
    assert [line["event"] for line in logs] == ["cdi_file_unusable"]
    assert registry.files_of("v.com/a=x") == ("/dev/vfio/1",)
    with pytest.raises(DevicesUnknown) as caught:
        registry.files_of("v.com/a=other")
    assert str(caught.value) == (
        f"CDI device v.com/a=other: no file in {folders[0]}, {folders[1]} describes it ({folders[0]}/bad.yaml cannot "
        "be read); write one with the tool of its vendor, or remove the annotation"
    )


def test_no_folders(tmp_path: Path) -> None:
    assert not Registry([tmp_path / "none"]).knows("v.com/a=x")


def test_names_in_annotations() -> None:
    annotations = {
        "cdi.k8s.io/gpu": "v.com/a=0, v.com/a=1",
        "cdi.k8s.io/claim_2": "v.com/b=x,",
        "other": "v.com/c=0",
    }
    assert names_in(annotations) == ["v.com/a=0", "v.com/a=1", "v.com/b=x"]

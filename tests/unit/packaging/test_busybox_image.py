"""The image archive, read back with nothing but the OCI documents' own rules."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import busybox_image
import pytest

if TYPE_CHECKING:
    from pathlib import Path

APPLETS = ["cat", "sh", "uname"]


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """A program that lists its applets as busybox does."""
    path = tmp_path / "busybox"
    path.write_text("#!/bin/sh\nprintf '%s\\n' busybox uname sh cat\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def archive(tmp_path: Path, busybox: Path) -> dict[str, bytes]:
    output = tmp_path / "out" / "image.tar"
    busybox_image.build(output, busybox=busybox)
    assert [path.name for path in output.parent.iterdir()] == ["image.tar"]
    with tarfile.open(output) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def blob(archive: dict[str, bytes], descriptor: dict[str, Any]) -> bytes:
    """Follows a descriptor, checking what it promises."""
    algorithm, _, digest = descriptor["digest"].partition(":")
    content = archive[f"blobs/{algorithm}/{digest}"]
    assert hashlib.new(algorithm, content).hexdigest() == digest
    assert len(content) == descriptor["size"]
    return content


def test_index_leads_to_layer_and_config(archive: dict[str, bytes]) -> None:
    assert json.loads(archive["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(archive["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == busybox_image.NAME
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "latest"
    manifest = json.loads(blob(archive, entry))
    config = json.loads(blob(archive, manifest["config"]))
    (layer,) = manifest["layers"]
    # A diff id is the digest of the layer's uncompressed form, which is what this one has.
    assert layer["mediaType"].endswith(".tar")
    assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(blob(archive, layer)).hexdigest()]
    assert config["architecture"] == entry["platform"]["architecture"]
    assert len(archive) == 5


def test_layer_is_a_usable_root(archive: dict[str, bytes], busybox: Path) -> None:
    (entry,) = json.loads(archive["index.json"])["manifests"]
    layer = blob(archive, json.loads(blob(archive, entry))["layers"][0])
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        members = {member.name: member for member in tar}
        program = tar.extractfile("bin/busybox")
        assert program is not None
        assert program.read() == busybox.read_bytes()
    assert members["bin/busybox"].mode == 0o755
    assert {name: members[f"bin/{name}"].linkname for name in APPLETS} == dict.fromkeys(APPLETS, "busybox")
    assert members["tmp"].mode == 0o1777
    assert (members["home/user"].uid, members["home/user"].gid) == (1000, 1000)
    assert {member.mtime for member in members.values()} == {0}
    # Unpackers create a parent that comes too late with the wrong mode.
    seen: set[str] = {""}
    for name in members:
        assert name.rpartition("/")[0] in seen
        seen.add(name)


def test_same_input_same_bytes(tmp_path: Path, busybox: Path) -> None:
    for name in ("one", "two"):
        busybox_image.build(tmp_path / name, busybox=busybox)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_images_differ_in_name_and_command_only(tmp_path: Path, busybox: Path) -> None:
    found = {}
    for image in (busybox_image.SHELL, busybox_image.PAUSE):
        busybox_image.build(tmp_path / "image.tar", busybox=busybox, image=image)
        with tarfile.open(tmp_path / "image.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        (entry,) = json.loads(files["index.json"])["manifests"]
        manifest = json.loads(blob(files, entry))
        config = json.loads(blob(files, manifest["config"]))
        assert entry["annotations"]["io.containerd.image.name"] == image.name
        assert config["config"].pop("Cmd") == list(image.command)
        found[image.name] = (config, manifest["layers"])
    shell, pause = found.values()
    assert shell == pause


def test_failure_leaves_the_old_image(tmp_path: Path) -> None:
    output = tmp_path / "image.tar"
    output.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        busybox_image.build(output, busybox=tmp_path / "absent")
    assert output.read_bytes() == b"old"

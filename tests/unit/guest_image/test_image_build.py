from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from guest_image import ImageError, Manifest, build
from guest_image import build as build_function
from guest_image.apt import Apt, Package
from guest_image.errors import ToolFailed

MODULE = sys.modules["guest_image.build"]


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "agent_version": "1.2.3", "arch": "amd64", "kernel_release": "6.1.0", "python_version": "3.11.2",
        "protobuf_version": "6.31", "packages": {"lib": "2.5.4"}, "kernel_modules": ["vsock"], "python_modules": 3,
        "parts": {"Python": 7_000_000, "agent": 300_000}, "files": 10, "files_sha256": "f", "vmlinux_bytes": 4,
        "initrd_bytes": 6, "inputs_sha256": "i",
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(manifest().to_json())
    assert Manifest.read(path) == manifest()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arch": "amd64", "unknown": 1}'])
def test_a_manifest_of_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ImageError, match="not a usable manifest"):
        Manifest.read(path)


def test_a_manifest_tells_what_is_in_the_image() -> None:
    text = str(manifest(notes=["dropped x"]))
    for part in (
        "kernel 6.1.0",
        "Python 3.11.2",
        "lib 2.5.4",
        "7.00 MB  Python",
        "kernel modules: vsock",
        "dropped x",
    ):
        assert part in text
    assert text.index("7.00 MB") < text.index("0.30 MB")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """The files of an earlier build of exactly this source tree."""
    inputs = MODULE._inputs_digest("amd64", None)
    (tmp_path / "vmlinux").write_bytes(b"1234")
    (tmp_path / "initrd.img").write_bytes(b"123456")
    (tmp_path / "manifest.json").write_text(manifest(inputs_sha256=inputs).to_json())
    return tmp_path


class Rebuilt(Exception):
    pass


@pytest.fixture(autouse=True)
def no_real_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuild(*args: object) -> None:
        raise Rebuilt

    monkeypatch.setattr(MODULE, "_sources", rebuild)


def test_an_unchanged_image_is_kept(built: Path) -> None:
    said: list[str] = []
    assert build_function(built, progress=said.append).agent_version == "1.2.3"
    assert said == [f"guest image in {built} is up to date"]


@pytest.mark.parametrize("name", ["vmlinux", "initrd.img", "manifest.json"])
def test_a_missing_file_is_made_again(built: Path, name: str) -> None:
    (built / name).unlink()
    with pytest.raises(Rebuilt):
        build(built, progress=lambda line: None)


def test_a_cut_file_is_made_again(built: Path) -> None:
    (built / "initrd.img").write_bytes(b"12345")
    with pytest.raises(Rebuilt):
        build(built, progress=lambda line: None)


@pytest.mark.parametrize(
    "changes", [{"suite": "sid"}, {"arch": "arm64"}, {"image": "ext4"}, {"image": "erofs", "verity": True}]
)
def test_other_options_make_another_image(built: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(Rebuilt):
        build(built, progress=lambda line: None, **changes)


@pytest.mark.parametrize(
    ("image", "verity", "kept"),
    [("erofs", True, True), ("erofs", False, False), ("ext4", True, False), (None, False, False)],
)
def test_a_root_image_is_kept_for_the_same_options(built: Path, image: Any, verity: bool, kept: bool) -> None:
    (built / "rootfs.img").write_bytes(b"12")
    (built / "image-initrd.img").write_bytes(b"1")
    parts = {"image_bytes": 2, "image_initrd_bytes": 1, "kernel_verity_params": "root_hash=00"}
    inputs = MODULE._inputs_digest("amd64", None)
    known = manifest(inputs_sha256=inputs, rootfs_type="erofs", **parts)
    (built / "manifest.json").write_text(known.to_json())
    if not kept:
        with pytest.raises(Rebuilt):
            build(built, progress=lambda line: None, image=image, verity=verity)
        return
    assert build(built, progress=lambda line: None, image=image, verity=verity) == known
    assert "root image 0.0 MB, erofs, checked with dm-verity: root_hash=00" in str(known)
    (built / "rootfs.img").write_bytes(b"1")
    with pytest.raises(Rebuilt):
        build(built, progress=lambda line: None, image=image, verity=verity)


def test_changed_sources_make_another_image(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text("x = 1\n")
    monkeypatch.setattr(MODULE, "PACKAGES_DIR", tmp_path)
    monkeypatch.setattr(MODULE, "_input_files", lambda: [changed])
    monkeypatch.setattr(MODULE, "agent_version", lambda: "1")
    before = MODULE._inputs_digest("amd64", None)
    changed.write_text("x = 2\n")
    assert MODULE._inputs_digest("amd64", None) != before


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match="no guest image for architecture 'pdp11': known are amd64, arm64, s390x"
    ):
        build(tmp_path, arch="pdp11", progress=lambda line: None)


# Packages


class FakeApt:
    """Stands for the programs apt-get and apt-cache."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.commands: list[list[str]] = []

    def run(self, argv: list[str], **options: object) -> bytes:
        self.commands.append(argv)
        for word, answer in self.answers.items():
            if word in argv:
                return answer.encode()
        return b""


@pytest.fixture
def fake_apt(monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    fake = FakeApt({})
    monkeypatch.setattr("guest_image.apt.run", fake.run)
    return fake


def test_uris_become_packages(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.answers["install"] = (
        "'http://m/pool/c/crun_1.8.1-1%2bdeb12u1_amd64.deb' crun_1.8.1-1+deb12u1_amd64.deb 289288 SHA256:aa\n"
        "some other line\n"
        "'http://m/pool/z/zlib1g_1.2.13_amd64.deb' zlib1g_1%3a1.2.13_amd64.deb 100 SHA256:bb\n"
    )
    packages = Apt(tmp_path, arch="amd64", suite=None).closure(["crun"])
    assert packages == [
        Package("crun", "1.8.1-1+deb12u1", "crun_1.8.1-1+deb12u1_amd64.deb", 289288, "aa"),
        Package("zlib1g", "1:1.2.13", "zlib1g_1%3a1.2.13_amd64.deb", 100, "bb"),
    ]


def test_nothing_of_the_system_is_read_or_written(fake_apt: FakeApt, tmp_path: Path) -> None:
    Apt(tmp_path, arch="arm64", suite="trixie").closure(["crun"])
    (command,) = fake_apt.commands
    for option in ("Dir::State::Lists", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourcelist"):
        assert any(word.startswith(f"{option}={tmp_path}") for word in command)
    assert "APT::Architecture=arm64" in command


def test_a_file_without_a_strong_digest_is_refused(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.answers["install"] = "'http://m/a_1_amd64.deb' a_1_amd64.deb 1 MD5Sum:aa\n"
    with pytest.raises(ImageError, match="no SHA-256 for a_1_amd64"):
        Apt(tmp_path, arch="amd64", suite=None).closure(["a"])


def test_a_download_that_is_not_what_was_promised(fake_apt: FakeApt, tmp_path: Path) -> None:
    package = Package("a", "1", "a_1_amd64.deb", 3, "0" * 64)
    apt = Apt(tmp_path, arch="amd64", suite=None)
    (tmp_path / "debs" / package.file).write_bytes(b"abc")
    with pytest.raises(ImageError, match=r"a_1_amd64\.deb is not what the mirror's list says"):
        apt.fetch([package], lambda line: None)


def test_dependencies(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.answers["show"] = (
        "Package: p\nPre-Depends: python3.11-minimal (>= 3.11)\nDepends: a:any | b, c\nSize: 1\n"
    )
    assert Apt(tmp_path, arch="amd64", suite=None).depends("p") == ["python3.11-minimal", "a", "c"]


def test_lists_are_fetched_once(fake_apt: FakeApt, tmp_path: Path) -> None:
    said: list[str] = []
    fake_apt.answers["indextargets"] = (
        "http://x/debian-security/|main|bookworm-security\nhttp://x/debian/|main|bookworm\n"
    )
    for _ in range(2):
        Apt(tmp_path, arch="amd64", suite="sid").refresh(said.append)
    assert said == ["fetching package lists"]
    assert sum("update" in command for command in fake_apt.commands) == 1
    assert (tmp_path / "suite.list").read_text().split()[2:] == ["http://x/debian", "sid", "main"]


def test_mirror_is_known_before_the_machine_has_fetched_any_lists(fake_apt: FakeApt, tmp_path: Path) -> None:
    Apt(tmp_path, arch="amd64", suite="sid").refresh(lambda line: None)
    (command,) = [command for command in fake_apt.commands if "indextargets" in command]
    assert "--no-release-info" in command  # with it apt lists only what it has
    assert not any("Created-By" in word for word in command)  # and with a filter


def test_mirror_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(argv: list[str], **options: object) -> bytes:
        if "update" not in argv:
            return b""
        # Otherwise apt warns of it and succeeds.
        assert "APT::Update::Error-Mode=any" in argv
        raise ToolFailed(
            "apt-get -o a -o b ...", ("E: Failed to fetch http://m/InRelease", "E: Some index files ...")
        )

    monkeypatch.setattr("guest_image.apt.run", fail)
    for _ in range(2):  # nothing remembers it as done
        with pytest.raises(ImageError) as caught:
            Apt(tmp_path, arch="amd64", suite="sid").refresh(lambda line: None)
        assert str(caught.value) == "no package lists: E: Failed to fetch http://m/InRelease"


def test_a_version_that_left_the_mirror_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offered = ["a_1_amd64.deb", "a_2_amd64.deb"]
    updates: list[str] = []

    def run(argv: list[str], **options: object) -> bytes:
        if "update" in argv:
            updates.append("update")
        if "install" in argv:
            file = offered[len(updates) - 1]
            return f"'http://m/{file}' {file} 3 SHA256:{sha256(file.encode()).hexdigest()}\n".encode()
        if "download" in argv:
            if len(updates) == 1:
                raise ToolFailed("apt-get ...", ("E: Failed to fetch http://m/a_1_amd64.deb 404",))
            (tmp_path / "debs" / offered[1]).write_text(offered[1])
        return b""

    monkeypatch.setattr("guest_image.apt.run", run)
    said: list[str] = []
    apt = Apt(tmp_path, arch="amd64", suite="sid")
    root = apt.newest("kind", lambda: apt.closure(["a"]), said.append)
    assert root.path.is_dir()
    assert updates == ["update", "update"]
    assert "looking for newer versions: E: Failed to fetch http://m/a_1_amd64.deb 404" in said
    apt.forget_packages()
    assert list((tmp_path / "debs").iterdir()) == []


def test_the_command_line_reports_errors_in_one_line(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "guest_image", "--output", str(tmp_path), "--arch", "vax"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "guest image: no guest image for architecture 'vax': known are amd64, arm64, s390x"
    ]


def test_the_manifest_is_json(built: Path) -> None:
    assert json.loads((built / "manifest.json").read_text())["agent_version"] == "1.2.3"

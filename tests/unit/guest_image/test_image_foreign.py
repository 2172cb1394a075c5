from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from guest_image import ImageError, foreign
from guest_image.python_set import Extension, ModuleSet
from guest_image.tools import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    directory = tmp_path / "root/usr/lib/python3.11/lib-dynload"
    directory.mkdir(parents=True)
    (directory / "_json.cpython-311-aarch64-linux-gnu.so").touch()
    return Root(tmp_path / "root", "arm64", {})


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would download a wheel; each leaves one."""
    commands: list[list[str]] = []

    def run(argv: list[Any], **options: object) -> bytes:
        commands.append([str(word) for word in argv])
        wheels = argv[argv.index("--dest") + 1]
        Path(wheels).mkdir(parents=True)
        with zipfile.ZipFile(f"{wheels}/protobuf.whl", "w") as archive:
            archive.writestr("google/_upb/_message.abi3.so", "machine code")
        return b""

    monkeypatch.setattr(foreign, "run", run)
    return commands


def modules(tmp_path: Path, *names: str) -> ModuleSet:
    return ModuleSet((), tuple(Extension(name, tmp_path / "host.so") for name in names), b"")


def test_extensions_are_the_guests(root: Root, downloads: list[list[str]], tmp_path: Path) -> None:
    wanted = modules(tmp_path, "_json", "google._upb._message")
    for _ in range(2):
        found = foreign.for_architecture(wanted, root, "python3.11", tmp_path / "cache", lambda line: None)
        json, upb = found.extensions
        assert json.path.name == "_json.cpython-311-aarch64-linux-gnu.so"
        assert upb.path.read_text() == "machine code"
    (command,) = downloads  # the second time it is in the cache
    assert "manylinux2014_aarch64" in command


def test_an_extension_that_the_guest_does_not_have(root: Root, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"the guest's python3\.11 has no extension module _ssl"):
        foreign.for_architecture(modules(tmp_path, "_ssl"), root, "python3.11", tmp_path, lambda line: None)

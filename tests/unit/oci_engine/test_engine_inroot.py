"""Paths in a root file system full of links: compared with what the kernel says of the same tree."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_engine import inroot

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("a", "b", "c")
STEP = st.sampled_from([*NAMES, "..", ".", ""])
PATH = st.lists(STEP, min_size=1, max_size=5).map("/".join)
TARGET = st.builds(lambda absolute, path: ("/" if absolute else "") + path, st.booleans(), PATH)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root").mkdir()
    fd = os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@settings(max_examples=150)
@given(
    links=st.dictionaries(st.sampled_from(["a", "b", "c", "a/a", "a/b", "b/c"]), TARGET, max_size=4),
    path=TARGET,
)
def test_resolves_as_the_kernel_does(links: dict[str, str], path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            if name not in links:
                os.mkdir(f"{folder}/{name}")
        for name, target in sorted(links.items()):
            place = Path(folder, name)
            if place.parent.is_dir() and not place.parent.is_symlink() and target:
                place.symlink_to(target)
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            try:
                opened = inroot.open_path(fd, path or ".")
            except OSError:
                return  # not there: nothing to compare with
            found = inroot.resolve(fd, path)
            assert not found.startswith(("/", ".."))
            assert os.path.samestat(os.fstat(opened), os.lstat(Path(folder, found)))
            os.close(opened)
        finally:
            os.close(fd)


@settings(max_examples=100)
@given(
    links=st.dictionaries(
        st.sampled_from(["a", "b", "c"]), TARGET.map(lambda target: f"/out/../../{target}"), max_size=3
    ),
    path=TARGET,
)
def test_nothing_is_ever_made_outside(links: dict[str, str], path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/root")
        for name, target in links.items():
            os.symlink(target, f"{folder}/root/{name}")
        fd = os.open(f"{folder}/root", os.O_PATH | os.O_DIRECTORY)
        try:
            for make in (inroot.make_directories, inroot.make_file):
                try:
                    os.close(make(fd, path))
                except OSError:
                    continue  # a loop, or a file that is a directory
        finally:
            os.close(fd)
        assert os.listdir(folder) == ["root"]


def test_dangling_links_are_made_good(root: int, tmp_path: Path) -> None:
    os.symlink("../run/x/file", "etc", dir_fd=root)
    os.close(inroot.make_file(root, "/etc"))
    assert (tmp_path / "root" / "run" / "x" / "file").is_file()


def test_what_is_there_stays(root: int, tmp_path: Path) -> None:
    (tmp_path / "root" / "file").write_text("kept")
    os.close(inroot.make_file(root, "file"))
    assert (tmp_path / "root" / "file").read_text() == "kept"
    with pytest.raises(NotADirectoryError):
        inroot.make_directories(root, "file/below")


def test_loops_end(root: int) -> None:
    os.symlink("b", "a", dir_fd=root)
    os.symlink("a", "b", dir_fd=root)
    with pytest.raises(OSError, match="levels of symbolic links"):
        inroot.resolve(root, "a")


def test_read_text_only_reads_files_of_the_root(root: int, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host's")
    os.symlink("../secret", "passwd", dir_fd=root)
    os.mkfifo("fifo", dir_fd=root)
    (tmp_path / "root" / "real").write_text("0123456789")
    assert inroot.read_text(root, "passwd", 100) == ""
    assert inroot.read_text(root, "fifo", 100) == ""
    assert inroot.read_text(root, "real", 4) == "0123"
    assert inroot.read_text(root, "missing", 4) == ""

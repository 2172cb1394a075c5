from __future__ import annotations

import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from guest_image import ImageError
from guest_image.cpio import Tree

if TYPE_CHECKING:
    from pathlib import Path


def example() -> Tree:
    tree = Tree()
    tree.file("init", b"#!/bin/x\n", 0o755)
    tree.file("/usr/lib/a", b"12345")
    tree.directory("tmp", 0o1777)
    tree.symlink("lib", "usr/lib")
    tree.character_device("dev/console", 5, 1)
    return tree


def test_one_file_byte_by_byte() -> None:
    tree = Tree()
    tree.file("a", b"hello", 0o640)
    numbers = [1, stat.S_IFREG | 0o640, 0, 0, 1, 0, 5, 0, 0, 0, 0, 2, 0]
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    entry = header + b"a\0" + b"hello\0\0\0"
    trailer = (
        b"070701" + b"".join(b"%08X" % n for n in [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0]) + b"TRAILER!!!\0"
    )
    assert tree.to_cpio() == entry + trailer + bytes(-len(entry + trailer) % 4)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio program to compare with")
def test_cpio_reads_it() -> None:
    listed = subprocess.run(
        ["cpio", "-itv", "--quiet", "--numeric-uid-gid"],
        input=example().to_cpio(), capture_output=True, check=True,
    )  # fmt: skip
    assert listed.stderr == b""
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert [(words[0], words[2:4]) for words in lines] == [
        ("drwxr-xr-x", ["0", "0"]),
        ("crw-------", ["0", "0"]),
        ("-rwxr-xr-x", ["0", "0"]),
        ("lrwxrwxrwx", ["0", "0"]),
        ("drwxrwxrwt", ["0", "0"]),
        ("drwxr-xr-x", ["0", "0"]),
        ("drwxr-xr-x", ["0", "0"]),
        ("-rw-r--r--", ["0", "0"]),
    ]
    assert [words[-1] for words in lines] == [
        "dev",
        "dev/console",
        "init",
        "usr/lib",
        "tmp",
        "usr",
        "usr/lib",
        "usr/lib/a",
    ]
    assert lines[1][4:6] == ["5,", "1"]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio program to compare with")
def test_cpio_unpacks_the_contents(tmp_path: Path) -> None:
    tree = Tree()
    tree.file("dir/odd", b"123")
    tree.file("dir/empty", b"")
    subprocess.run(["cpio", "-id", "--quiet"], input=tree.to_cpio(), cwd=tmp_path, check=True)
    assert (tmp_path / "dir/odd").read_bytes() == b"123"
    assert (tmp_path / "dir/empty").read_bytes() == b""


def test_the_order_of_adding_does_not_matter() -> None:
    other = Tree()
    other.character_device("dev/console", 5, 1)
    other.symlink("lib", "usr/lib")
    other.directory("tmp", 0o1777)
    other.file("usr/lib/a", b"12345")
    other.file("init", b"#!/bin/x\n", 0o755)
    assert other.to_cpio() == example().to_cpio()


def test_parents_appear_by_themselves_and_keep_a_mode_given_before() -> None:
    tree = Tree()
    tree.directory("a", 0o700)
    tree.file("a/b/c", b"")
    assert [(path, stat.S_IMODE(entry.mode)) for path, entry in tree] == [
        ("a", 0o700),
        ("a/b", 0o755),
        ("a/b/c", 0o644),
    ]


def test_the_same_file_twice_is_fine_and_another_is_not() -> None:
    tree = Tree()
    tree.file("a", b"x")
    tree.file("/a", b"x")
    assert len(tree) == 1
    assert "a" in tree
    with pytest.raises(ImageError, match="two different files for /a"):
        tree.file("a", b"y")


@pytest.mark.parametrize("path", ["", "/", "../x", "a/../../b"])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(ImageError, match="not a path inside the image"):
        Tree().file(path, b"")

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
from typing import TYPE_CHECKING

import pytest

from guest_image import ImageError, kernel
from guest_image.tools import Root
from tests.unit.guest_image import elves

if TYPE_CHECKING:
    from pathlib import Path

NO_TOOLS = Root.__new__(Root)


def bzimage(payload: bytes, size: int) -> bytes:
    """A boot sector, one sector of setup code, and a payload eight bytes into the code, as the boot protocol says."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    payload += struct.pack("<I", size)
    struct.pack_into("<II", setup, 0x248, 8, len(payload))
    return bytes(setup) + b"codecode" + payload + b"rest"


def test_the_kernel_comes_out_of_its_wrapping() -> None:
    inside = elves.noted(b"Xen", 18)
    assert kernel.vmlinux(bzimage(gzip.compress(inside), len(inside)), "vmlinuz", NO_TOOLS) == inside


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (bytes(2048), "vmlinuz is not an x86 Linux kernel"),
        (bzimage(b"????" + bytes(20), 4), "compressed in an unknown way"),
        (bzimage(gzip.compress(elves.noted(b"Xen", 18)), 5), "its header says 5"),
        (bzimage(gzip.compress(elves.noted(b"Xen", 17)), len(elves.noted(b"Xen", 17))), "no PVH entry"),
        (bzimage(gzip.compress(b"text"), 4), "not a 64-bit ELF file"),
    ],
)
def test_what_is_wrong_with_a_kernel(image: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        kernel.vmlinux(image, "vmlinuz", NO_TOOLS)


def test_a_missing_program_is_taken_from_the_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    inside = elves.noted(b"Xen", 18)
    with pytest.raises(ImageError, match="none of the unpacked packages has usr/bin/gzip or bin/gzip"):
        kernel.vmlinux(bzimage(gzip.compress(inside), len(inside)), "vmlinuz", Root(tmp_path, "amd64", {}))


@pytest.fixture
def modules(tmp_path: Path) -> kernel.ModuleDirectory:
    directory = tmp_path / "6.1.0-test"
    files = {
        "top.ko": "mid-a,mid_b",
        "mid_a.ko": "low",
        "mid-b.ko": "low,inside",
        "low.ko": "",
        "old.ko": None,
    }
    for name, depends in files.items():
        path = directory / "kernel" / "drivers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(elves.module(depends))
    packed = directory / "kernel" / "fs" / "packed.ko.xz"
    packed.parent.mkdir()
    packed.write_bytes(lzma.compress(elves.module("low")))
    (packed.parent / "other.ko.zst").write_bytes(b"")
    (directory / "modules.builtin").write_text("kernel/fs/inside.ko\nkernel/fs/ext4/e-x-t.ko\n")
    return kernel.ModuleDirectory(directory)


def test_modules_come_after_what_they_need(modules: kernel.ModuleDirectory) -> None:
    found = modules.closure(["top", "packed", "old", "inside"])
    assert [module.name for module in found] == ["low", "mid_a", "mid_b", "top", "packed", "old"]
    assert {module.name: module.needs for module in found}["mid_b"] == ("low", "inside")
    assert modules.builtin == {"inside", "e_x_t"}
    assert modules.release == "6.1.0-test"


def test_compressed_modules_are_unpacked(modules: kernel.ModuleDirectory) -> None:
    assert modules.load("packed").data == elves.module("low")
    with pytest.raises(ImageError, match=r"other\.ko\.zst is compressed in a way"):
        modules.load("other")


def test_an_unknown_module(modules: kernel.ModuleDirectory) -> None:
    with pytest.raises(ImageError, match=r"kernel 6\.1\.0-test has no module nonsense"):
        modules.closure(["nonsense"])
    assert [modules.has_file(name) for name in ("top", "inside", "nonsense")] == [True, False, False]


def test_signatures_are_cut_off(modules: kernel.ModuleDirectory, tmp_path: Path) -> None:
    plain = elves.module("")
    signature = b"signature"
    info = bytes(8) + len(signature).to_bytes(4, "big")
    signed = plain + signature + info + b"~Module signature appended~\n"
    (tmp_path / "6.1.0-test/kernel/drivers/low.ko").write_bytes(signed)
    assert modules.load("low").data == plain

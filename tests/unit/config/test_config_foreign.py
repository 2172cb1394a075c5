"""Guests of other architectures than the host's: where they are, and what of a file is not about them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from config import ConfigError, HostLimits, load
from config.schema.hypervisor import DEFAULT_INITRD, DEFAULT_KERNEL
from tests.unit.config.config_site import HOST, VERITY, Site

MACHINE_TYPE = "io.katacontainers.config.hypervisor.machine_type"
KERNEL = "io.katacontainers.config.hypervisor.kernel"


@pytest.fixture
def any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is taken to exist."""
    monkeypatch.setattr("config.validate._QemuTopics._file", lambda self, name, path, **_: path)


@pytest.mark.usefixtures("any_file")
@pytest.mark.parametrize(
    ("host", "machine_type", "folder"),
    [
        ("q35", "q35", ""),
        ("q35", "virt", "arm64/"),
        ("q35", "s390-ccw-virtio", "s390x/"),
        ("virt", "virt", ""),
        ("virt", "q35", "amd64/"),
        ("", "q35", "amd64/"),
    ],
)
def test_the_usual_guest_is_that_of_the_architecture(
    site: Site, host: str, machine_type: str, folder: str
) -> None:
    limits = HostLimits(8, 16384, host)
    text = f"[hypervisor.qemu]\nmachine_type = '{machine_type}'\nvirtio_fs_daemon = '/x'\n"
    for named in ("", f"kernel = '{DEFAULT_KERNEL}'\ninitrd = '{DEFAULT_INITRD}'\n"):
        qemu = site.load(text + named, limits).config.hypervisor
        base = f"/usr/share/kata-py/{folder}"
        assert (qemu.kernel, qemu.initrd) == (f"{base}vmlinux", f"{base}initrd.img")
    qemu = site.load(f"{text}guest_dir = '/guests'\nkernel = '/mine'\n", limits).config.hypervisor
    assert (qemu.kernel, qemu.initrd) == (
        "/mine",
        f"/guests/{folder}initrd.img" if folder else DEFAULT_INITRD,
    )


@pytest.mark.usefixtures("any_file")
def test_an_image_needs_no_initrd_there_either(site: Site) -> None:
    qemu = site.load("[hypervisor.qemu]\nmachine_type = 'virt'\nimage = '/disk'\n").config.hypervisor
    assert (qemu.image, qemu.initrd) == ("/disk", "")


def test_what_is_missing_comes_with_what_to_install(site: Site) -> None:
    lines = site.lines(
        "[hypervisor.qemu]\nmachine_type = 's390-ccw-virtio'\nguest_dir = '/nowhere'\n"
        f"path = '/nowhere/qemu'\nvirtio_fs_daemon = '{site.root}/virtiofsd'\n"
    )
    assert [line.removeprefix(f"{site.file}: hypervisor.qemu.") for line in lines] == [
        "path: /nowhere/qemu does not exist (install qemu-system-s390x or name QEMU's system emulator here)",
        "kernel: /nowhere/s390x/vmlinux does not exist (build the guest with: kata-py guest build --arch s390x)",
        "initrd: /nowhere/s390x/initrd.img does not exist (build the guest with: kata-py guest build --arch s390x)",
    ]


FILES = (
    "path = '/q'\nkernel = '/k'\nimage = '/disk'\nimage_initrd = '/small'\nkernel_verity_params = '@'\n"
    "firmware = '/f'\n"
    "cpu_features = 'pmu=off'\nvirtio_fs_daemon = '/v'\nkernel_params = 'a=b'\ndefault_memory = 300\n"
    "enable_iommu = true\nenable_annotations = ['.*']\n"
    "guest_extension_images = [{name = 'coco', path = '/bin/sh'}]\n"
).replace("@", VERITY)


def by_annotation(site: Site, text: str) -> object:
    return site.load(text, annotations={MACHINE_TYPE: "virt"})


def by_image(site: Site, text: str) -> object:
    site.file.write_text(text)
    return load(site.file, env={}, host=HOST, machine_type="virt")


@pytest.mark.usefixtures("any_file")
@pytest.mark.parametrize("chosen", [by_annotation, by_image])
def test_another_architecture_leaves_the_files_guest_behind(
    site: Site, chosen: Callable[[Site, str], object]
) -> None:
    loaded = chosen(site, f"[hypervisor.qemu]\n{FILES}")
    qemu = loaded.config.hypervisor  # type: ignore[attr-defined]
    assert qemu.machine_type == "virt"
    assert qemu.path == "/usr/bin/qemu-system-aarch64"
    assert (qemu.kernel, qemu.initrd) == (
        "/usr/share/kata-py/arm64/vmlinux",
        "/usr/share/kata-py/arm64/initrd.img",
    )
    assert (qemu.image, qemu.kernel_verity_params, qemu.firmware, qemu.cpu_features) == ("", "", "", "")
    assert (qemu.guest_extension_images, qemu.image_initrd) == ((), "")
    # What is not about an architecture, or protects somebody, stays.
    assert (qemu.kernel_params, qemu.default_memory, qemu.enable_iommu) == ("a=b", 300, True)


@pytest.mark.usefixtures("any_file")
def test_annotations_name_files_of_the_machine_that_they_name(site: Site) -> None:
    annotations = {MACHINE_TYPE: "virt", KERNEL: "/theirs"}
    qemu = site.load(f"[hypervisor.qemu]\n{FILES}", annotations=annotations).config.hypervisor
    assert (qemu.kernel, qemu.image) == ("/theirs", "")
    qemu = site.load(f"[hypervisor.qemu]\n{FILES}", annotations={MACHINE_TYPE: "q35"}).config.hypervisor
    assert (qemu.kernel, qemu.image, qemu.path) == ("/k", "/disk", "/q")


def test_the_origin_is_told(site: Site, tmp_path: Path) -> None:
    for name in ("vmlinux", "initrd.img"):
        (tmp_path / "arm64").mkdir(exist_ok=True)
        (tmp_path / "arm64" / name).touch()
    text = f"[hypervisor.qemu]\n{site.required()}guest_dir = '{tmp_path}'\n"
    site.file.write_text(text)
    try:
        loaded = load(site.file, env={}, host=HOST, machine_type="virt")
    except ConfigError as err:  # a host without that emulator is told so, and of nothing else
        assert "qemu-system-arm" in str(err)
        assert len(err.problems) == 1
        return
    assert loaded.origins["hypervisor.qemu.machine_type"] == "the image's architecture"
    assert "hypervisor.qemu.kernel" not in loaded.origins

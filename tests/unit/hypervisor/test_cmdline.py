"""What the builder refuses, and that other architectures need data only."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import hypervisor.arch
from hypervisor.arch import Arch, Cpu, Devices
from hypervisor.errors import InvalidSpec
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.spec import Share, VmSpec

FDS = Fds(qmp=3, console=4, vsock=5, guest_cid=42)


def spec(**fields: Any) -> VmSpec:
    defaults: dict[str, Any] = {
        "name": "vm",
        "run_dir": Path("/run/vm"),
        "qemu_path": Path("/usr/bin/qemu"),
        "kernel": Path("/vmlinux"),
    }
    return VmSpec(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("fields", "fds", "message"),
    [
        ({"arch": "vax"}, FDS, "no support for vax guests; supported: x86_64"),
        ({"initrd": Path("/i"), "image": Path("/j")}, FDS, "an initrd or an image, not both"),
        ({"vsock": "user"}, Fds(qmp=3, console=4), "needs a connected socket"),
        ({"vsock": "vhost"}, Fds(qmp=3, console=4, vsock=5), "an open /dev/vhost-vsock and a guest address"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], fds: Fds, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        build_cmdline(spec(**fields), fds)


def test_every_share_needs_its_socket() -> None:
    share = Share(tag="t", directory=Path("/srv"), daemon=Path("/usr/libexec/virtiofsd"))
    with pytest.raises(ValueError, match="zip"):
        build_cmdline(spec(shares=(share,)), FDS)


@pytest.mark.parametrize(
    ("slots", "limit", "written"),
    [(0, 0, "256M"), (10, 256, "256M"), (0, 4096, "256M"), (10, 4096, "256M,slots=10,maxmem=4G")],
)
def test_room_for_memory_is_written_when_there_is_some(slots: int, limit: int, written: str) -> None:
    argv = build_cmdline(spec(memory_slots=slots, max_memory_mib=limit), FDS)
    assert argv[argv.index("-m") + 1] == written


def test_descriptors_are_listed_once() -> None:
    assert Fds(qmp=3, console=4).all() == [3, 4]
    assert Fds(qmp=3, console=4, vsock=5, shares=(6, 7)).all() == [3, 4, 5, 6, 7]


ARM64 = Arch(
    name="aarch64",
    qemu_binary="qemu-system-aarch64",
    machine="virt",
    machine_props={"kvm": "gic-version=host", "tcg": "usb=off"},
    cpu={"kvm": Cpu(model="host"), "tcg": Cpu(model="cortex-a57")},
    devices=Devices(
        user_vsock="vhost-user-vsock-pci",
        vhost_vsock="vhost-vsock-pci",
        fs="vhost-user-fs-pci",
        block="virtio-blk-pci",
        console=None,
    ),
    kernel_words=("console=ttyAMA0",),
)
S390X = Arch(
    name="s390x",
    qemu_binary="qemu-system-s390x",
    machine="s390-ccw-virtio",
    machine_props={"kvm": "", "tcg": ""},
    cpu={"kvm": Cpu(model="host"), "tcg": Cpu(model="max")},
    devices=Devices(
        user_vsock="vhost-user-vsock-pci",
        vhost_vsock="vhost-vsock-ccw",
        fs="vhost-user-fs-ccw",
        block="virtio-blk-ccw",
        console="sclpconsole",
    ),
    kernel_words=("console=ttysclp0",),
)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"arch": "aarch64"},
            "-machine virt,memory-backend=mem,usb=off -accel tcg,tb-size=64 -cpu cortex-a57",
        ),
        ({"arch": "aarch64"}, "-serial chardev:console"),
        ({"arch": "aarch64", "accel": "kvm"}, "-machine virt,memory-backend=mem,gic-version=host -accel kvm"),
        # Properties of the default machine say nothing about another one.
        ({"arch": "aarch64", "machine_type": "sbsa-ref"}, "-machine sbsa-ref,memory-backend=mem -accel"),
        ({"arch": "aarch64", "tsc_khz": 1000}, "-append console=ttyAMA0 panic=-1 quiet"),
        ({"arch": "s390x"}, "-device sclpconsole,chardev=console"),
        ({"arch": "s390x", "vsock": "vhost"}, "-device vhost-vsock-ccw,vhostfd=5,guest-cid=42"),
        ({"arch": "s390x", "image": Path("/i")}, "-device virtio-blk-ccw,drive=rootfs"),
    ],
)
def test_another_architecture_is_a_record(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: str
) -> None:
    arches = MappingProxyType({arch.name: arch for arch in (ARM64, S390X)})
    monkeypatch.setattr(hypervisor.arch, "ARCHES", arches)
    assert expected in " ".join(build_cmdline(spec(**fields), FDS))

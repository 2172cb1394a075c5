"""What the builder refuses, and what differs by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.spec import Share, VmSpec
from hypervisor.verity import Verity

VERITY = Verity(root_hash="a" * 64, salt="-", data_blocks=1, data_block_size=4096, hash_block_size=4096)
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
        ({"arch": "vax"}, FDS, "no support for vax guests; supported: aarch64, s390x, x86_64"),
        ({"initrd": Path("/i"), "image": Path("/j")}, FDS, "an initrd or an image, not both"),
        ({"vsock": "user"}, Fds(qmp=3, console=4), "needs a connected socket"),
        ({"vsock": "vhost"}, Fds(qmp=3, console=4, vsock=5), "an open /dev/vhost-vsock and a guest address"),
        ({"firmware": Path("/f"), "pflash": (Path("/c"),)}, FDS, "a file or flash memory, not both"),
        ({"hugepages": True, "memory_dir": Path("/m")}, FDS, "a file in /m or huge pages, not both"),
        ({"arch": "s390x", "iommu": True}, FDS, "s390x guests have no virtual IOMMU"),
        ({"arch": "s390x", "pcie_root_ports": 1}, FDS, "s390x guests have no PCIe ports"),
        ({"pcie_root_ports": 1, "pcie_switch_ports": 1}, FDS, "of the root complex or of a switch"),
        ({"pcie_root_ports": 17}, FDS, "17 PCIe ports are more than 16"),
        (
            {"image_initrd": Path("/i")},
            FDS,
            "image_initrd mounts an image, and the guest has none; set image",
        ),
        ({"image": Path("/i"), "rootfs_driver": "nvdimm"}, FDS, "/i has 0 bytes; persistent memory needs"),
        (
            {"image": Path("/i"), "rootfs_driver": "nvdimm", "image_bytes": 2**20 + 512},
            FDS,
            "a multiple of 4096",
        ),
        (
            {"arch": "s390x", "image": Path("/i"), "rootfs_driver": "nvdimm", "image_bytes": 2**20},
            FDS,
            "s390x guests have no persistent memory; use virtio-blk-ccw for /i",
        ),
        (
            {"arch": "aarch64", "image": Path("/i"), "rootfs_driver": "nvdimm", "image_bytes": 2**20},
            FDS,
            "aarch64 guests find persistent memory only through firmware",
        ),
        ({"initdata": Path("/i")}, FDS, "initial data need an open file"),
        ({"verity": VERITY}, FDS, "the guest has none; set image"),
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
    assert Fds(qmp=3, console=4, initdata=8, shares=(6,)).all() == [3, 4, 8, 6]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"arch": "aarch64"},
            "-machine virt,memory-backend=mem,usb=off -accel tcg,tb-size=64 -cpu cortex-a57",
        ),
        ({"arch": "aarch64"}, "-serial chardev:console"),
        (
            {"arch": "aarch64", "accel": "kvm"},
            "-machine virt,memory-backend=mem,usb=off,gic-version=host -accel kvm",
        ),
        # Properties of the default machine say nothing about another one.
        ({"arch": "aarch64", "machine_type": "sbsa-ref"}, "-machine sbsa-ref,memory-backend=mem -accel"),
        (
            {"arch": "aarch64", "tsc_khz": 1000},
            "-append console=ttyAMA0 cryptomgr.notests rcupdate.rcu_expedited=1 mitigations=off panic=-1 quiet",
        ),
        # Kata's files for this architecture have it; QEMU refuses it without KVM.
        (
            {"arch": "aarch64", "machine_accelerators": "usb=off,gic-version=host"},
            "-machine virt,memory-backend=mem,usb=off -accel tcg",
        ),
        (
            {"arch": "aarch64", "accel": "kvm", "machine_accelerators": "gic-version=3"},
            "-machine virt,memory-backend=mem,usb=off,gic-version=3 -accel kvm",
        ),
        ({"accel": "kvm", "iommu": True}, "-accel kvm,kernel-irqchip=split"),
        ({"arch": "aarch64", "accel": "kvm", "iommu": True}, "-accel kvm -cpu"),
        ({"arch": "s390x"}, "-device sclpconsole,chardev=console"),
        ({"arch": "s390x", "vsock": "vhost"}, "-device vhost-vsock-ccw,vhostfd=5,guest-cid=42"),
        ({"arch": "s390x", "image": Path("/i")}, "-device virtio-blk-ccw,drive=rootfs"),
    ],
)
def test_another_architecture_is_a_record(fields: dict[str, Any], expected: str) -> None:
    assert expected in " ".join(build_cmdline(spec(**fields), FDS))

"""Confidential guests: what a host offers them, what they have to do without, and what QEMU is told of both."""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from hypervisor.confidential import (
    check_vfio_device,
    choose_accel,
    choose_protection,
    choose_vsock,
    memory_encryption,
    quote_socket,
)
from hypervisor.errors import HostUnsupported, InvalidSpec
from hypervisor.host import Host
from hypervisor.protection import Protection, SecureExecution, Snp, Tdx
from hypervisor.qemu.cmdline import build_cmdline
from hypervisor.spec import Share
from tests.unit.hypervisor.test_cmdline import FDS, spec

TDX = "sys/module/kvm_intel/parameters/tdx"
SNP = "sys/module/kvm_amd/parameters/sev_snp"
SEV = "sys/module/kvm_amd/parameters/sev"
SE = {
    "proc/cpuinfo": "vendor_id : IBM/S390\nfacilities : 0 1 158 161\n\nprocessor : 0\n",
    "proc/cmdline": "prot_virt=1",
}
QUOTES = "var/run/tdx-qgs/qgs.socket"


def host(root: Path, files: dict[str, str] | None = None, arch: str = "x86_64") -> Host:
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Host(root=root, arch=arch)


def refusal(function: Any, *args: Any, **more: Any) -> str:
    """The error's text, which is one line and ends with what to do."""
    with pytest.raises(HostUnsupported) as caught:
        function(*args, **more)
    text = str(caught.value)
    assert text.startswith("confidential_guest = true cannot work: ")
    assert text.endswith(", or remove the key")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("files", "arch", "snp", "kind"),
    [
        ({TDX: "Y\n"}, "x86_64", False, "tdx"),
        ({TDX: "1"}, "x86_64", False, "tdx"),
        ({SNP: "Y\n", SEV: "Y\n"}, "x86_64", True, "snp"),
        ({SNP: "Y\n", TDX: "N\n"}, "x86_64", True, "snp"),
        (SE, "s390x", False, "se"),
        (SE | {"proc/cmdline": "root=/dev/dasda1 prot_virt=Yes quiet\n"}, "s390x", False, "se"),
    ],
)
def test_protection_that_a_host_offers(
    tmp_path: Path, files: dict[str, str], arch: str, snp: bool, kind: str
) -> None:
    assert choose_protection(arch, snp=snp, host=host(tmp_path, files, arch)) == kind


@pytest.mark.parametrize(
    ("files", "arch", "snp", "said"),
    [
        ({}, "x86_64", False, f"neither /{TDX} nor /{SNP} is Y; enable TDX or SEV-SNP"),
        ({TDX: "N\n", SNP: "N\n", SEV: "N\n"}, "x86_64", True, "neither"),
        ({TDX: "Yes please"}, "x86_64", False, "neither"),
        ({TDX: ""}, "x86_64", False, "neither"),
        ({SNP: "Y\n"}, "x86_64", False, "used only if asked for; set sev_snp_guest = true"),
        ({SEV: "Y\n"}, "x86_64", False, "SEV without SEV-SNP"),
        ({SEV: "Y\n", SNP: "N\n"}, "x86_64", True, "load kvm_amd with sev_snp=1"),
        ({TDX: "Y\n"}, "x86_64", True, "this host has TDX; use a configuration for TDX"),
        ({}, "s390x", False, "lacks facility 158"),
        (SE | {"proc/cpuinfo": "facilities : 1580 15 8\n"}, "s390x", False, "lacks facility 158"),
        (SE | {"proc/cpuinfo": "facilities : 1\n\nfacilities : 158\n"}, "s390x", False, "lacks facility 158"),
        (SE | {"proc/cmdline": ""}, "s390x", False, "without prot_virt=1"),
        (
            SE | {"proc/cmdline": "prot_virt=0 x=prot_virt=1 prot_virt=10"},
            "s390x",
            False,
            "without prot_virt=1",
        ),
        ({TDX: "Y\n"}, "aarch64", False, "aarch64 guests have no protection here; use x86_64 or s390x"),
    ],
)
def test_no_protection(tmp_path: Path, files: dict[str, str], arch: str, snp: bool, said: str) -> None:
    assert said in refusal(choose_protection, arch, snp=snp, host=host(tmp_path, files, arch))


def test_a_parameter_that_is_a_folder_is_not_on(tmp_path: Path) -> None:
    (tmp_path / TDX).mkdir(parents=True)
    assert "neither" in refusal(
        choose_protection, "x86_64", snp=False, host=Host(root=tmp_path, arch="x86_64")
    )


def test_kvm_is_needed(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "flags : vmx\n"}
    assert "it needs KVM, and that does not run: /dev/kvm: No such file" in refusal(
        choose_accel, "x86_64", host(tmp_path, files)
    )
    assert "the guest is s390x, the host x86_64" in refusal(choose_accel, "s390x", host(tmp_path))
    assert choose_accel("x86_64", host(tmp_path, {"dev/kvm": ""})).value == "kvm"


def test_the_kernels_vsock_is_needed(tmp_path: Path) -> None:
    said = refusal(choose_vsock, host(tmp_path))
    assert (
        "/dev/vhost-vsock does not open: No such file or directory; load the kernel module vhost_vsock"
        in said
    )
    assert choose_vsock(host(tmp_path, {"dev/vhost-vsock": ""})).value == "vhost"


@pytest.mark.parametrize(
    ("port", "files", "found"),
    [
        (4050, {QUOTES: ""}, 4050),
        (1, {}, 1),
        (0, {}, 4050),
        (0, {QUOTES: ""}, Path("/var/run/tdx-qgs/qgs.socket")),
    ],
)
def test_who_signs_reports(tmp_path: Path, port: int, files: dict[str, str], found: Path | int) -> None:
    assert quote_socket(port, host(tmp_path, files)) == found


def cpuid(root: Path, *registers: int) -> Host:
    path = root / "dev/cpu/0/cpuid"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.seek(0x8000001F)  # a hole: nothing is written before
        file.write(struct.pack(f"={len(registers)}I", *registers))
    return Host(root=root, arch="x86_64")


@pytest.mark.parametrize(
    ("ebx", "bits"),
    [(0x4173, (51, 5)), (0x006F, (47, 1)), (0xFFFFF000 | 51, (51, 0)), (0xFFF, (63, 63)), (0, (0, 0))],
)
def test_the_encryption_bit(tmp_path: Path, ebx: int, bits: tuple[int, int]) -> None:
    assert memory_encryption(cpuid(tmp_path, 1, ebx, 2, 3)) == bits


@pytest.mark.skipif(not Path("/dev/cpu/0/cpuid").exists(), reason="the host's kernel has no cpuid device")
def test_cpuid_of_this_host() -> None:
    _, ebx, ecx, edx = Host().cpuid(0)
    assert struct.pack("=3I", ebx, edx, ecx).decode() == Host().cpuinfo()["vendor_id"]


def test_the_encryption_bit_cannot_be_asked(tmp_path: Path) -> None:
    said = refusal(memory_encryption, Host(root=tmp_path, arch="x86_64"))
    assert f"{tmp_path}/dev/cpu/0/cpuid: No such file or directory; load the kernel module cpuid" in said
    assert "it ends before this leaf" in refusal(memory_encryption, cpuid(tmp_path, 1, 2, 3))


@pytest.mark.parametrize("path", ["/dev/vfio/12", "/dev/vfio/0", "/dev/vfio/noiommu-3"])
def test_a_vfio_group_is_refused_by_its_path(path: str) -> None:
    with pytest.raises(InvalidSpec, match=f"^{path}: a VFIO group .*IOMMUFD: .*/dev/vfio/devices$"):
        check_vfio_device(Path(path))


@pytest.mark.parametrize(
    "path", ["/dev/vfio/devices/vfio0", "/dev/iommu", "/dev/vfio/12/x", "/mnt/dev/vfio/12"]
)
def test_a_device_of_iommufd_is_fine(path: str) -> None:
    check_vfio_device(Path(path))


TDX_GUEST = Tdx(quote_socket=4050)
SNP_GUEST = Snp(cbitpos=51, reduced_phys_bits=1, policy=0x30000)
FIRMWARE = {"firmware": Path("/f"), "accel": "kvm", "vsock": "vhost"}
SEALED = {"arch": "s390x", "accel": "kvm", "vsock": "vhost"}
SHARE = Share(tag="t", directory=Path("/srv"), daemon=Path("/v"))


@pytest.mark.parametrize(
    ("protection", "fields", "said"),
    [
        (TDX_GUEST, FIRMWARE | {"accel": "tcg"}, "needs KVM"),
        (TDX_GUEST, FIRMWARE | {"vsock": "user"}, "shares no memory"),
        (TDX_GUEST, FIRMWARE | {"shares": (SHARE,)}, "shares no memory"),
        (TDX_GUEST, FIRMWARE | {"hugepages": True}, "no huge pages"),
        (TDX_GUEST, FIRMWARE | {"virtio_mem": True}, "no virtio-mem"),
        (SNP_GUEST, FIRMWARE | {"balloon": True}, "no balloon"),
        (SNP_GUEST, FIRMWARE | {"memory_dir": Path("/m")}, "no file as memory"),
        (
            SNP_GUEST,
            FIRMWARE | {"image": Path("/i"), "rootfs_driver": "nvdimm", "image_bytes": 4096},
            "no nvdimm",
        ),
        (SNP_GUEST, FIRMWARE | {"firmware": None}, "starts from firmware made for it; name its file"),
        (TDX_GUEST, FIRMWARE | {"firmware": None}, "starts from firmware made for it; name its file"),
        (TDX_GUEST, FIRMWARE | {"firmware": None, "pflash": (Path("/p"),)}, "not in flash memory"),
        (SecureExecution(), SEALED | {"initrd": Path("/i")}, "inside the kernel: no initrd"),
        (SecureExecution(), SEALED | {"image": Path("/i")}, "inside the kernel: no initrd"),
    ],
)
def test_what_cannot_be_protected_is_refused(
    protection: Protection, fields: dict[str, Any], said: str
) -> None:
    fds = (
        FDS
        if not fields.get("shares")
        else FDS.__class__(qmp=3, console=4, vsock=5, guest_cid=42, shares=(6,))
    )
    with pytest.raises(InvalidSpec, match=f"^a confidential guest .*{said}"):
        build_cmdline(spec(protection=protection, **fields), fds)


def guest_object(protection: Protection, fields: dict[str, Any]) -> str:
    argv = build_cmdline(spec(protection=protection, **fields), FDS)
    firmware = argv.index("-bios") if "-bios" in argv else len(argv)
    before = [argv[at + 1] for at, word in enumerate(argv[:firmware]) if word == "-object"]
    if protection.needs_firmware:
        assert argv[firmware - 2 : firmware] == ["-object", before[-1]]
    return before[-1]


@pytest.mark.parametrize("length", [0, 20, 32, 48, 64])
def test_what_is_measured_has_the_size_of_its_field(length: int) -> None:
    digest = bytes(range(1, length + 1))
    tdx = json.loads(guest_object(Tdx(quote_socket=1, measured=digest), FIRMWARE))
    snp = guest_object(Snp(cbitpos=51, reduced_phys_bits=1, policy=0, measured=digest), FIRMWARE)
    if not digest:
        assert "mrconfigid" not in tdx
        assert "host-data" not in snp
        return
    found = re.search(r",host-data=([^,]+)", snp)
    assert found is not None
    assert b64decode(tdx["mrconfigid"], validate=True) == digest[:48] + bytes(max(0, 48 - length))
    assert b64decode(found[1], validate=True) == digest[:32] + bytes(max(0, 32 - length))


def test_a_path_in_json_is_json() -> None:
    odd = Path('/run/q"s,\\x')
    assert json.loads(guest_object(Tdx(quote_socket=odd), FIRMWARE))["quote-generation-socket"][
        "path"
    ] == str(odd)


@pytest.mark.parametrize("policy", [0, 1, 0x30000, 2**64 - 1])
def test_policy_is_written_as_bits(policy: int) -> None:
    snp = Snp(cbitpos=51, reduced_phys_bits=1, policy=policy)
    assert f",policy={hex(policy)}" in guest_object(snp, FIRMWARE)


def test_a_guest_that_may_be_debugged_would_not_be_protected() -> None:
    for protection in (TDX_GUEST, SNP_GUEST):
        quiet, chatty = (guest_object(protection, FIRMWARE | {"debug": debug}) for debug in (False, True))
        assert quiet == chatty


def test_secure_execution_needs_no_firmware() -> None:
    assert guest_object(SecureExecution(), SEALED) == "s390-pv-guest,id=pv0"

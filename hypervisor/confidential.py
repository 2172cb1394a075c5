"""Which protection a confidential guest gets on this host, and what else of the host it needs.

There is no second best here: a guest that asked to be hidden from its host runs hidden or not at all. Whatever is
missing is an error of one line with the remedy, before anything is started.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hypervisor.accel import VHOST_VSOCK, Choice, why_not_kvm
from hypervisor.errors import HostUnsupported, InvalidSpec

if TYPE_CHECKING:
    from hypervisor.host import Host
    from hypervisor.spec import Accel, VsockKind

Kind = Literal["tdx", "snp", "se"]

_TDX = "sys/module/kvm_intel/parameters/tdx"
_SNP = "sys/module/kvm_amd/parameters/sev_snp"
_SEV = "sys/module/kvm_amd/parameters/sev"
# What a facility list of a Z processor says when it can unpack sealed guests.
_SE_FACILITY = "158"
_SE_WORD = re.compile(r"(?:^|\s)prot_virt=(?:1|on|y|yes)(?:\s|$)", re.IGNORECASE)
_QUOTE_SOCKET = Path("/var/run/tdx-qgs/qgs.socket")
_QUOTE_PORT = 4050
# Encrypted memory, of AMD's processors.
_ENCRYPTION_LEAF = 0x8000001F
_VFIO_GROUP = re.compile(r"/dev/vfio/(?:noiommu-)?[0-9]+")


def choose_accel(guest_arch: str, host: Host) -> Choice[Accel]:
    """KVM: no other accelerator hides anything. Raises HostUnsupported when it cannot run such a guest here."""
    if problem := why_not_kvm(host, guest_arch):
        raise _unsupported(
            f"it needs KVM, and that does not run: {problem}", "enable virtualization for this host"
        )
    return Choice("kvm")


def choose_vsock(host: Host) -> Choice[VsockKind]:
    """The kernel's: a device of ours would have to map the guest's memory. Raises HostUnsupported without one."""
    if problem := host.why_not_openable(VHOST_VSOCK):
        raise _unsupported(
            f"it needs the kernel's vsock device, and /dev/vhost-vsock does not open: {problem}",
            "load the kernel module vhost_vsock",
        )
    return Choice("vhost")


def choose_protection(guest_arch: str, *, snp: bool, host: Host) -> Kind:
    """The protection that this host offers to guests of an architecture; SEV-SNP only if the configuration says `snp`.

    Raises HostUnsupported when there is none, or another than the configuration is made for.
    """
    if guest_arch == "x86_64":
        return _of_a_pc(snp, host)
    if guest_arch == "s390x":
        return _of_a_mainframe(host)
    raise _unsupported(f"{guest_arch} guests have no protection here", "use x86_64 or s390x")


def quote_socket(port: int, host: Host) -> Path | int:
    """Where a TDX guest's reports are signed; port 0 leaves the choice to the host."""
    if port:
        return port
    there = (host.root / _QUOTE_SOCKET.relative_to("/")).exists()
    return _QUOTE_SOCKET if there else _QUOTE_PORT


def memory_encryption(host: Host) -> tuple[int, int]:
    """The page bit that means "encrypted", and how many address bits encryption takes, by the processor's own word.

    Raises HostUnsupported when it cannot be asked.
    """
    try:
        _, ebx, _, _ = host.cpuid(_ENCRYPTION_LEAF)
    except OSError as err:
        raise _unsupported(
            f"the processor's page encryption bit is unknown: {err.filename}: {err.strerror}",
            "load the kernel module cpuid",
        ) from err
    return ebx & 0x3F, ebx >> 6 & 0x3F


def check_vfio_device(path: Path) -> None:
    """Refuse a device of the host that a confidential guest cannot be given. Raises InvalidSpec.

    Through a group's file the kernel maps all of a guest's memory for devices, which hidden memory does not allow.
    """
    if _VFIO_GROUP.fullmatch(str(path)):
        raise InvalidSpec(
            f"{path}: a VFIO group cannot be given to a confidential guest; it needs IOMMUFD: "
            "name the device's file below /dev/vfio/devices"
        )


def _of_a_pc(snp: bool, host: Host) -> Kind:
    if host.switched_on(_TDX):
        if snp:
            raise _unsupported(
                "sev_snp_guest asks for SEV-SNP, and this host has TDX", "use a configuration for TDX"
            )
        return "tdx"
    if host.switched_on(_SNP):
        if not snp:
            raise _unsupported(
                "this host has SEV-SNP, which is used only if asked for", "set sev_snp_guest = true"
            )
        return "snp"
    if host.switched_on(_SEV):
        raise _unsupported(
            f"this host has SEV without SEV-SNP (/{_SNP} is not Y), which is not supported",
            "enable SEV-SNP in the firmware and load kvm_amd with sev_snp=1",
        )
    raise _unsupported(
        f"neither /{_TDX} nor /{_SNP} is Y",
        "enable TDX or SEV-SNP in the host's firmware and load kvm_intel with tdx=1 or kvm_amd with sev_snp=1",
    )


def _of_a_mainframe(host: Host) -> Kind:
    if _SE_FACILITY not in host.cpuinfo().get("facilities", "").split():
        raise _unsupported(
            f"the processor lacks facility {_SE_FACILITY}, Secure Execution",
            "enable it for this logical partition",
        )
    if not _SE_WORD.search(host.kernel_words()):
        raise _unsupported(
            "the host's kernel runs without prot_virt=1", "add it to the host's kernel command line"
        )
    return "se"


def _unsupported(problem: str, remedy: str) -> HostUnsupported:
    return HostUnsupported(f"confidential_guest = true cannot work: {problem}; {remedy}, or remove the key")

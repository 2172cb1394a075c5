"""What hides a guest's memory from its host: one frozen record for each kind, as QEMU has to be told.

A record exists when the host has been asked (`hypervisor.confidential`); nothing here touches the host. Measured
data, the digest of what the guest is started with, is cut or filled with zeros to the size that each kind has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path

_TDX_MEASURED_BYTES = 48
_SNP_MEASURED_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Tdx:
    """Intel Trust Domain Extensions."""

    id: ClassVar[str] = "tdx"
    cpu_model: ClassVar[str] = ""
    """Empty is the architecture's own."""
    needs_firmware: ClassVar[bool] = True
    split_irqchip: ClassVar[bool] = True
    """Whether QEMU has to emulate what of the interrupt controller the protected guest cannot leave to KVM."""
    boots_from_kernel: ClassVar[bool] = False
    """Whether root file system and kernel command line are sealed inside of the kernel's file."""
    bounces: ClassVar[bool] = False
    """Whether virtio devices on channels have to be told that the guest copies what they may see to buffers outside of
    its hidden memory (bounce buffers). PCI devices of protected guests know."""

    quote_socket: Path | int
    """The service that signs the guest's reports: a Unix socket, or a vsock port of the host."""
    measured: bytes = b""

    @property
    def mrconfigid(self) -> bytes:
        """`measured` in the size of the register."""
        return _sized(self.measured, _TDX_MEASURED_BYTES)


@dataclass(frozen=True, kw_only=True)
class Snp:
    """AMD Secure Encrypted Virtualization with Secure Nested Paging."""

    id: ClassVar[str] = "snp"
    # The firmware that measures the guest does so with the processor's model.
    cpu_model: ClassVar[str] = "EPYC-v4"
    needs_firmware: ClassVar[bool] = True
    split_irqchip: ClassVar[bool] = True
    boots_from_kernel: ClassVar[bool] = False
    bounces: ClassVar[bool] = False

    cbitpos: int
    """Bit of a page's address that says whether the page is encrypted."""
    reduced_phys_bits: int
    """Bits of physical addresses that encryption takes away."""
    policy: int
    id_block: str = ""
    """Who signed the guest, base64; empty, as `id_auth`, when nobody did."""
    id_auth: str = ""
    measured: bytes = b""

    @property
    def host_data(self) -> bytes:
        """`measured` in the size of the report's field."""
        return _sized(self.measured, _SNP_MEASURED_BYTES)


@dataclass(frozen=True, kw_only=True)
class SecureExecution:
    """IBM Secure Execution. The guest's owner has sealed everything inside the kernel's file, measurements too."""

    id: ClassVar[str] = "pv0"
    cpu_model: ClassVar[str] = ""
    needs_firmware: ClassVar[bool] = False
    split_irqchip: ClassVar[bool] = False
    boots_from_kernel: ClassVar[bool] = True
    bounces: ClassVar[bool] = True


Protection = Tdx | Snp | SecureExecution


def _sized(measured: bytes, size: int) -> bytes:
    return measured[:size].ljust(size, b"\0") if measured else b""

"""From the configuration to what protects a guest on this host, and the file with the initial data of any guest.

Loaded only for a guest that has one of the two. What can be said without a host has been said when the configuration
was read (`config.confidential`, `config.initdata`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from config.initdata import parse
from hypervisor import confidential
from hypervisor.protection import Protection, SecureExecution, Snp, Tdx

if TYPE_CHECKING:
    from pathlib import Path

    from config.schema import Qemu
    from hypervisor.host import Host


def protection(qemu: Qemu, guest_arch: str, host: Host) -> Protection:
    """What this host hides the guest with, and how the configuration wants it. Raises HostUnsupported."""
    kind = confidential.choose_protection(guest_arch, snp=qemu.sev_snp_guest, host=host)
    if kind == "se":
        return SecureExecution()
    measured = parse(qemu.initdata).digest() if qemu.initdata else b""
    if kind == "tdx":
        port = qemu.tdx_quote_generation_service_socket_port
        return Tdx(quote_socket=confidential.quote_socket(port, host), measured=measured)
    cbitpos, reduced_phys_bits = confidential.memory_encryption(host)
    return Snp(
        cbitpos=cbitpos,
        reduced_phys_bits=reduced_phys_bits,
        policy=qemu.snp_guest_policy,
        id_block=qemu.snp_id_block,
        id_auth=qemu.snp_id_auth,
        measured=measured,
    )


def write_initdata(qemu: Qemu, path: Path) -> None:
    """Write the disk with the guest's initial data, for nobody else to read. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(parse(qemu.initdata).image())

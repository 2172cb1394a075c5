"""The switches of a confidential guest: the object that protects it, its firmware, its memory.

A TDX object is JSON, because that is the only form in which QEMU takes its quote service's address. No field of any of
them opens the guest to the host: a guest that may be debugged is not protected.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.protection import Snp, Tdx
from hypervisor.qemu import args
from hypervisor.vsock.base import HOST_CID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.protection import Protection
    from hypervisor.spec import VmSpec


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MemoryBackendRam(args.Props):
    """`-object memory-backend-ram`: memory of QEMU's own, which no other process can map."""

    id: str
    size: str
    prealloc: bool | None = None
    host_nodes: args.Nodes | None = None
    policy: args.MemoryPolicy | None = None

    def argv(self) -> list[str]:
        return ["-object", args.join_props("memory-backend-ram", self)]


class TdxGuest(args.Head):
    """`-object` with a `tdx-guest`; the value is its JSON."""

    def argv(self) -> list[str]:
        return ["-object", args.text(self.value)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SevSnpGuest(args.Props):
    """`-object sev-snp-guest`. With `kernel_hashes` kernel, initrd and command line are measured as well."""

    id: str
    cbitpos: int
    reduced_phys_bits: int
    kernel_hashes: bool = True
    policy: str
    id_block: str | None
    id_auth: str | None
    host_data: str | None

    def argv(self) -> list[str]:
        return ["-object", args.join_props("sev-snp-guest", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class S390PvGuest(args.Props):
    """`-object s390-pv-guest`."""

    id: str

    def argv(self) -> list[str]:
        return ["-object", args.join_props("s390-pv-guest", self)]


def protection(spec: VmSpec, wanted: Protection) -> Iterator[args.Switch]:
    """The object, and right after it the firmware that it starts and measures. Raises InvalidSpec for a machine that
    could not be protected so.
    """
    if problem := _contradiction(spec, wanted):
        raise InvalidSpec(f"a confidential guest {problem}")
    yield _guest_object(wanted)
    if spec.firmware is not None:
        yield args.Bios(spec.firmware)


def _contradiction(spec: VmSpec, wanted: Protection) -> str:
    if spec.accel != "kvm":
        return "needs KVM"
    if spec.shares or spec.vsock == "user":
        return "shares no memory with other processes: it has no virtiofs, and the kernel's vsock device"
    if spec.rootfs_driver == "nvdimm" or spec.hugepages or spec.memory_dir is not None:
        return "has memory of its own only: no nvdimm, no huge pages, no file as memory"
    if spec.virtio_mem or spec.balloon:
        return "keeps the memory that it boots with: no virtio-mem and no balloon"
    if spec.dump_dir is not None:
        return "shows nothing in a dump of its memory; remove guest_memory_dump_path"
    if spec.virtio_mem or spec.balloon:
        return "keeps the memory that it starts with: no virtio-mem, no balloon"
    if wanted.boots_from_kernel and (spec.initrd is not None or spec.image is not None):
        return "with Secure Execution has its root file system inside the kernel: no initrd and no image"
    if spec.pflash:
        return "starts from firmware in a file, not in flash memory"
    if wanted.needs_firmware and spec.firmware is None:
        return "starts from firmware made for it; name its file as firmware"
    return ""


def _guest_object(wanted: Protection) -> args.Switch:
    if isinstance(wanted, Tdx):
        return TdxGuest(_tdx_json(wanted))
    if isinstance(wanted, Snp):
        return SevSnpGuest(
            id=wanted.id,
            cbitpos=wanted.cbitpos,
            reduced_phys_bits=wanted.reduced_phys_bits,
            policy=hex(wanted.policy),
            id_block=wanted.id_block or None,
            id_auth=wanted.id_auth or None,
            host_data=_base64(wanted.host_data),
        )
    return S390PvGuest(id=wanted.id)


def _tdx_json(tdx: Tdx) -> str:
    words: dict[str, object] = {"qom-type": "tdx-guest", "id": tdx.id, "sept-ve-disable": True}
    if tdx.mrconfigid:
        words["mrconfigid"] = _base64(tdx.mrconfigid)
    if isinstance(tdx.quote_socket, Path):
        words["quote-generation-socket"] = {"type": "unix", "path": str(tdx.quote_socket)}
    else:
        words["quote-generation-socket"] = {
            "type": "vsock",
            "cid": str(HOST_CID),
            "port": str(tdx.quote_socket),
        }
    return json.dumps(words, separators=(",", ":"))


def _base64(measured: bytes) -> str | None:
    return b64encode(measured).decode() if measured else None

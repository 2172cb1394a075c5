"""From the configuration of a confidential guest to its machine, on hosts that are folders; and the initial data."""

from __future__ import annotations

import gzip
import hashlib
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from config import Config
from config.schema import Qemu
from hypervisor.errors import HostUnsupported
from hypervisor.protection import SecureExecution, Snp, Tdx
from shim.confidential import write_initdata
from shim.plan import plan
from tests.unit.hypervisor.test_confidential import QUOTES, SE, SNP, TDX, cpuid, host

if TYPE_CHECKING:
    from hypervisor.host import Host

TOML = b'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n'
INITDATA = b64encode(gzip.compress(TOML)).decode()
DIGEST = hashlib.sha256(TOML).digest()
PC = {"confidential_guest": True, "shared_fs": "none", "firmware": "/f", "initdata": INITDATA}
READY = {"dev/kvm": "", "dev/vhost-vsock": "", "proc/cpuinfo": "flags : vmx svm\n"}


def planned(qemu: dict[str, Any], on: Host) -> Any:
    config = Config(hypervisor=replace(Qemu(), **qemu))
    return plan(config, "s1", exported=Path("/e"), host=on)


def test_a_tdx_host(tmp_path: Path) -> None:
    found = planned(PC, host(tmp_path, READY | {TDX: "Y\n", QUOTES: ""}))
    assert (found.accel, found.vsock, found.shares) == ("kvm", "vhost", ())
    assert found.protection == Tdx(quote_socket=4050, measured=DIGEST)
    assert found.initdata == Path("/run/kata-py/s1/initdata.image")


def test_a_tdx_host_that_signs_by_a_socket(tmp_path: Path) -> None:
    qemu = PC | {"tdx_quote_generation_service_socket_port": 0, "initdata": ""}
    found = planned(qemu, host(tmp_path, READY | {TDX: "Y\n", QUOTES: ""}))
    assert found.protection == Tdx(quote_socket=Path(f"/{QUOTES}"))
    assert found.initdata is None


def test_an_snp_host(tmp_path: Path) -> None:
    cpuid(tmp_path, 0, 51 | 5 << 6, 0, 0)
    qemu = PC | {"sev_snp_guest": True, "snp_id_block": "a", "snp_id_auth": "b", "snp_guest_policy": 0xB0000}
    found = planned(qemu, host(tmp_path, READY | {SNP: "Y\n"}))
    assert found.protection == Snp(
        cbitpos=51, reduced_phys_bits=5, policy=0xB0000, id_block="a", id_auth="b", measured=DIGEST
    )


def test_a_host_with_secure_execution(tmp_path: Path) -> None:
    qemu = {
        "confidential_guest": True,
        "shared_fs": "none",
        "machine_type": "s390-ccw-virtio",
        "initdata": INITDATA,
    }
    found = planned(qemu, host(tmp_path, READY | SE, "s390x"))
    assert found.protection == SecureExecution()
    assert found.iommu_platform  # bounce buffers
    assert (found.initrd, found.image) == (None, None)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"dev/vhost-vsock": "", TDX: "Y\n"}, "it needs KVM"),
        (READY | {TDX: "N\n"}, "neither"),
        ({"dev/kvm": "", "proc/cpuinfo": "flags : vmx\n", TDX: "Y\n"}, "load the kernel module vhost_vsock"),
    ],
)
def test_there_is_no_second_best(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(HostUnsupported, match=said):
        planned(PC, host(tmp_path, files))


def test_an_ordinary_guest_on_such_a_host_stays_ordinary(tmp_path: Path) -> None:
    found = planned({"shared_fs": "none", "initdata": INITDATA}, host(tmp_path, READY | {TDX: "Y\n"}))
    assert found.protection is None
    assert found.initdata == Path("/run/kata-py/s1/initdata.image")


def test_initial_data_are_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "initdata.image"
    write_initdata(Qemu(initdata=INITDATA), path)
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    assert gzip.decompress(content[16 : 16 + length]) == TOML
    with pytest.raises(FileExistsError):  # nobody put something there that would be written through
        write_initdata(Qemu(initdata=INITDATA), path)

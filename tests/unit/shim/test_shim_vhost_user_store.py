"""From a device's number to the socket of the program that serves it."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from agent_proto.gen import oci_pb2
from config.schema import Qemu
from shim.disk_needs import devices_on_disks
from shim.errors import InvalidRequest, NotSupported
from shim.vhost_user_store import socket_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    """A store with two disks, a target, and what is of no interest."""
    devices, sockets = tmp_path / "block/devices", tmp_path / "block/sockets"
    devices.mkdir(parents=True)
    sockets.mkdir()
    for name, kind, major, minor in (
        ("a-file", stat.S_IFREG, 0, 0),
        ("a-null", stat.S_IFCHR, 241, 7),
        ("disk0", stat.S_IFBLK, 241, 0),
        ("disk7", stat.S_IFBLK, 241, 7),
        ("not-served", stat.S_IFBLK, 241, 8),
        ("no-socket", stat.S_IFBLK, 241, 9),
        ("target", stat.S_IFBLK, 242, 0),
    ):
        os.mknod(devices / name, kind | 0o600, os.makedev(major, minor))
    (devices / "dangling").symlink_to("nowhere")
    for name in ("disk0", "disk7", "target"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(sockets / name))
    (sockets / "no-socket").touch()
    return replace(Qemu(), enable_vhost_user_store=True, vhost_user_store_path=str(tmp_path))


def test_by_its_number(qemu: Qemu, tmp_path: Path) -> None:
    assert socket_of(241, 0, qemu, "x") == tmp_path / "block/sockets/disk0"
    assert socket_of(241, 7, qemu, "x") == tmp_path / "block/sockets/disk7"


def test_numbers_of_others(qemu: Qemu) -> None:
    assert socket_of(8, 0, qemu, "x") is None
    assert socket_of(241, 0, replace(qemu, enable_vhost_user_store=False), "x") is None


def test_a_driver_that_has_the_number(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/sys/dev/block/241:3")
    assert socket_of(241, 3, qemu, "x") is None


@pytest.mark.parametrize(
    ("major", "minor", "kind", "said"),
    [
        (
            241,
            200,
            InvalidRequest,
            "no node in .*/block/devices has its number, 241:200; make one, or correct vhost",
        ),
        (
            241,
            8,
            InvalidRequest,
            "sockets/not-served: No such file or directory; start the program that serves it",
        ),
        (241, 9, InvalidRequest, "sockets/no-socket is no socket"),
        (
            242,
            0,
            NotSupported,
            "devices/target is served as vhost-user-scsi .*; serve it as vhost-user-blk, with",
        ),
    ],
)
def test_what_cannot_be(qemu: Qemu, major: int, minor: int, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"^device /dev/x: .*{said}"):
        socket_of(major, minor, qemu, "device /dev/x")


def test_no_store(qemu: Qemu) -> None:
    with pytest.raises(InvalidRequest, match="no node in /none/block/devices"):
        socket_of(241, 0, replace(qemu, vhost_user_store_path="/none"), "x")


@pytest.mark.parametrize("privileged", [False, True])
def test_a_containers_device_becomes_a_served_disk(qemu: Qemu, tmp_path: Path, privileged: bool) -> None:
    """Also of a privileged container, whose other devices are all the host's."""
    spec = oci_pb2.Spec()
    spec.Linux.Devices.add(Path="/dev/xda", Type="b", Major=241, Minor=7)
    if privileged:
        spec.Linux.Resources.Devices.add(Allow=True, Access="rwm")
    else:
        spec.Linux.Resources.Devices.add(Allow=True, Type="b", Major=241, Minor=7, Access="r")
    needs = devices_on_disks(spec, qemu)
    (need,) = needs.disks
    assert (need.path, need.served) == (str(tmp_path / "block/sockets/disk7"), True)
    assert (need.container_path, need.read_only) == ("/dev/xda", not privileged)
    assert [device.Path for device in needs.devices] == ["/dev/xda"]

"""What the host's kernel can do for a guest, it does: run it (KVM), carry its sockets and its packets (vhost)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor.accel import why_not_kvm
from hypervisor.host import Host
from tests.integration.faults import parts
from tests.integration.test_network import HOST, in_guest, namespace, wired

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd
    from tests.integration.test_network import Namespace

__all__ = ["namespace", "wired"]  # fixtures
pytestmark = pytest.mark.one_version


def opened(pid: int) -> set[str]:
    """The files and devices that a process has open; a machine of KVM's is a file without a name."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(str(each.readlink()))
    return found


def has(device: str) -> str:
    """Why this host does not have what the device stands for; empty when it does."""
    if device == "kvm":
        return why_not_kvm(Host(), os.uname().machine) or ""
    return Host().why_not_openable(f"dev/{device}") or ""


@pytest.mark.parametrize("device", ["kvm", "vhost-vsock", "vhost-net"])
def test_the_device_is_used(containerd: Containerd, wired: Namespace, device: str) -> None:
    if lack := has(device):
        pytest.skip(f"this host has no {device}: {lack}")
    container = containerd.start("sleep", "1000", options=["--with-ns", f"network:{wired.path}"])
    pid = parts(container)["qemu"]
    assert f"/dev/{device}" in opened(pid)
    in_guest(containerd, container, "ping", "-c", "1", "-W", "10", HOST)
    if device == "kvm":
        assert "anon_inode:kvm-vcpu:0" in opened(pid)
    containerd.remove(container)

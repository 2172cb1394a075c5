"""What depends on the host: whom QEMU runs as, and under which label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from config import Config, Qemu
from hypervisor.errors import HostUnsupported
from hypervisor.host import Host
from shim.plan import plan

if TYPE_CHECKING:
    from pathlib import Path

LABEL = "system_u:system_r:container_kvm_t:s0"


@pytest.mark.parametrize(
    ("keys", "selinux", "label"),
    [
        ({}, False, ""),
        ({"selinux_label": LABEL}, True, LABEL),
        ({"selinux_label": LABEL}, False, None),
        ({"selinux_label": LABEL, "disable_selinux": True}, True, ""),
        ({"selinux_label": LABEL, "disable_selinux": True}, False, ""),
    ],
)
def test_a_label_needs_a_host_with_selinux(
    tmp_path: Path, keys: dict[str, Any], selinux: bool, label: str | None
) -> None:
    if selinux:
        (tmp_path / "sys/fs/selinux").mkdir(parents=True)
        (tmp_path / "sys/fs/selinux/enforce").write_text("1")
    config = Config(hypervisor=replace(Qemu(), accel="tcg", vsock="user", **keys))
    if label is None:
        with pytest.raises(
            HostUnsupported, match=f"QEMU cannot run as {LABEL}: this host has no SELinux; remove"
        ):
            plan(config, "s1", exported=tmp_path, host=Host(root=tmp_path))
    else:
        spec = plan(config, "s1", exported=tmp_path, host=Host(root=tmp_path))
        assert spec.selinux_label == label


def test_rootless_is_a_user_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    config = Config(hypervisor=replace(Qemu(), accel="tcg", vsock="user", rootless=True))
    users = {plan(config, name, exported=tmp_path, host=Host(root=tmp_path)).user for name in ("s1", "s2")}
    assert len(users) == 2
    assert None not in users

"""Devices of containers: the usual, those asked for, and the guest's own for the privileged."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from guest_agent import devices
from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

ALL = {"allow": True, "type": "a", "access": "rwm"}


@pytest.fixture
def sys(tmp_path: Path) -> str:
    """A /sys that knows two devices."""
    for path in ("dev/char/10:200", "dev/char/11:0", "dev/block/7:0"):
        (tmp_path / "sys" / path).mkdir(parents=True)
    return str(tmp_path / "sys")


def adapted(linux: dict[str, Any], sys: str, dev: str = "/dev") -> dict[str, Any]:
    devices.adapt(linux, sys, dev)
    return linux


def test_all_but_the_usual_and_the_specified_are_denied(sys: str) -> None:
    wanted = [
        {"path": "/dev/x", "type": "c", "major": 10, "minor": 200},
        {"path": "/dev/f", "type": "p", "major": 0, "minor": 0},
        {"path": "/dev/u", "type": "u", "major": 11, "minor": 0},
    ]
    rules = adapted({"devices": wanted}, sys)["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"} in rules
    assert {"allow": True, "type": "c", "major": 136, "access": "rwm"} in rules
    assert rules[-2:] == [
        {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
        {"allow": True, "type": "c", "major": 11, "minor": 0, "access": "rwm"},
    ]


def test_rules_of_the_host_are_kept(sys: str) -> None:
    rules = [{"allow": True, "type": "c", "major": 1, "access": "rwm"}]
    assert adapted({"resources": {"devices": rules}}, sys)["resources"]["devices"] == rules


@pytest.mark.parametrize("numbers", [("b", 7, 1), ("c", 7, 0), ("u", 7, 0)])
def test_devices_that_the_guest_does_not_have_are_refused(sys: str, numbers: tuple[str, int, int]) -> None:
    kind, major, minor = numbers
    with pytest.raises(InvalidRequest, match=rf"device /dev/x \(\w+ {major}:{minor}\) is not in the guest"):
        adapted({"devices": [{"path": "/dev/x", "type": kind, "major": major, "minor": minor}]}, sys)


@pytest.mark.skipif(os.getuid() != 0, reason="makes device nodes")
def test_privileged_containers_get_the_guests(tmp_path: Path, sys: str) -> None:
    dev = tmp_path / "dev"
    for name in ("kmsg", "null", "net/tun", "pts/0", "shm/x"):
        (dev / name).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(dev / name, stat.S_IFCHR | 0o600, os.makedev(1, 11))
    os.mknod(dev / "vda", stat.S_IFBLK, os.makedev(254, 0))
    (dev / "fd").symlink_to("/proc/self/fd")
    (dev / "file").touch()
    mine = {"path": "/dev/net/tun", "type": "c", "major": 99, "minor": 9}
    linux = adapted({"resources": {"devices": [ALL]}, "devices": [mine]}, sys, str(dev))
    assert linux["resources"]["devices"] == [ALL]
    assert linux["devices"][0] == mine
    assert {device["path"]: (device["type"], device["major"]) for device in linux["devices"][1:]} == {
        "/dev/kmsg": ("c", 1),
        "/dev/vda": ("b", 254),
    }
    assert next(device["fileMode"] for device in linux["devices"] if device["path"] == "/dev/kmsg") == 0o600

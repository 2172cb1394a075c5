"""Which devices a container has: the usual ones, those of its specification, or all of the guest's.

A privileged container is told by its one rule, which allows every device. For others "every device" means those of the
machine that they run on, and this is the guest. What the host has lent to a container is added elsewhere (`disks`,
`passthrough`).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from agent_proto.gen import oci_pb2
    from guest_agent.oci import Json

#: Devices every container gets, as other runtimes' default specifications allow them.
_DEFAULT_DEVICES: tuple[tuple[str, int, int | None], ...] = (
    ("c", 1, 3), ("c", 1, 5), ("c", 1, 7), ("c", 1, 8), ("c", 1, 9), ("c", 5, 0), ("c", 5, 1), ("c", 5, 2),
    ("c", 136, None),
)  # fmt: skip
#: What the engine makes in every container's /dev, and what is mounted there.
_ENGINES = frozenset(
    {"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero", "pts", "shm", "mqueue"}
)
#: Devices that are there once their driver is loaded, by the numbers that Linux gives them for good.
_DRIVERS = {("c", 10, 200): "tun", ("c", 10, 229): "fuse"}
_KINDS = {"c": "char", "u": "char", "b": "block"}


def drivers_for(spec: oci_pb2.Spec) -> list[str]:
    """The kernel modules that make devices of a specification."""
    wanted = ((device.Type, device.Major, device.Minor) for device in spec.Linux.Devices)
    return [_DRIVERS[numbers] for numbers in wanted if numbers in _DRIVERS]


def adapt(linux: Json, sys: str = "/sys", dev: str = "/dev") -> None:
    """Set the devices of a specification's Linux part and the rules of its cgroup, in place.

    Raises InvalidRequest for a device that the guest does not have.
    """
    resources = linux.setdefault("resources", {})
    devices = linux.get("devices") or []
    assert isinstance(resources, dict)
    assert isinstance(devices, list)
    if any(rule["allow"] and rule.get("type") == "a" for rule in resources.get("devices") or []):
        known = {device["path"] for device in devices}
        linux["devices"] = [*devices, *(device for device in _guests(dev) if device["path"] not in known)]
        return
    for device in devices:
        _require(device, sys)
    if not resources.get("devices"):
        resources["devices"] = _rules(devices)


def _guests(dev: str) -> list[Json]:
    found: list[Json] = []
    for directory, folders, files in os.walk(dev):
        if directory == dev:
            folders[:] = [name for name in folders if name not in _ENGINES]
            files = [name for name in files if name not in _ENGINES]
        for name in files:
            info = os.lstat(f"{directory}/{name}")
            kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
            if kind:
                path = f"/dev{directory.removeprefix(dev)}/{name}"
                numbers = {"major": os.major(info.st_rdev), "minor": os.minor(info.st_rdev)}
                owner = {"uid": info.st_uid, "gid": info.st_gid}
                found.append(
                    {"path": path, "type": kind, "fileMode": stat.S_IMODE(info.st_mode), **numbers, **owner}
                )
    return found


def _require(device: Json, sys: str) -> None:
    kind = _KINDS.get(str(device["type"]))
    if kind and not os.path.exists(f"{sys}/dev/{kind}/{device['major']}:{device['minor']}"):
        raise InvalidRequest(
            f"device {device['path']} ({kind} {device['major']}:{device['minor']}) is not in the guest: "
            "devices of the host are not passed through; run the container without it"
        )


def _rules(devices: list[Json]) -> list[Json]:
    """Nothing but the usual devices and those of the specification. Making a node of any kind stays allowed."""
    rules: list[Json] = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
    ]
    for kind, major, minor in _DEFAULT_DEVICES:
        rules.append({"allow": True, "type": kind, "major": major, "access": "rwm"})
        if minor is not None:
            rules[-1]["minor"] = minor
    for device in devices:
        if device["type"] != "p":
            kind = "c" if device["type"] == "u" else str(device["type"])
            numbers = {"major": device["major"], "minor": device["minor"]}
            rules.append({"allow": True, "type": kind, **numbers, "access": "rwm"})
    return rules

"""What the guest changes in a container's specification: namespaces, cgroup, devices, sysctls.

The network, the host name and System V IPC belong to the sandbox, and the sandbox is the whole guest: containers
join the namespaces of PID 1. Settings of the kernel that live in those namespaces are the guest's, so the agent
writes them itself; an engine refuses them for a container that does not have the namespace to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_agent.cgroup import PARENT
from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from guest_agent.oci import Json

_SHARED = {"ipc": "/proc/1/ns/ipc", "uts": "/proc/1/ns/uts"}
_NOT_IN_GUEST = frozenset({"network", "time"})
#: Devices every container gets, as runc's and crun's default specifications allow them.
_DEFAULT_DEVICES: tuple[tuple[str, int, int | None], ...] = (
    ("c", 1, 3), ("c", 1, 5), ("c", 1, 7), ("c", 1, 8), ("c", 1, 9), ("c", 5, 0), ("c", 5, 1), ("c", 5, 2),
    ("c", 136, None),
)  # fmt: skip


def adapt(config: Json, container_id: str, pid_namespace: str) -> None:
    """Adapt a specification to this guest, in place. `pid_namespace` is a path to join, empty for a new one.

    Raises InvalidRequest for a sysctl that the kernel refuses.
    """
    linux = config.setdefault("linux", {})
    assert isinstance(linux, dict)
    linux["namespaces"] = _namespaces(linux.get("namespaces") or [], pid_namespace)
    linux["cgroupsPath"] = f"{PARENT}/{container_id}"
    config.setdefault("mounts", [])  # crun wants the key also when there are none
    config.pop("hostname", None)  # the sandbox's, set by PID 1
    resources = linux.setdefault("resources", {})
    if not resources.get("devices"):
        resources["devices"] = _device_rules(linux.get("devices") or [])
    apply_sysctls(linux.pop("sysctl", None) or {})


def _namespaces(wanted: list[Json], pid_namespace: str) -> list[Json]:
    kept: list[Json] = []
    for namespace in wanted:
        kind = str(namespace["type"])
        if kind in _NOT_IN_GUEST or kind == "pid":
            continue
        if kind in _SHARED and not namespace.get("path"):
            kept.append({"type": kind, "path": _SHARED[kind]})
        else:
            kept.append(namespace)
    if not any(namespace["type"] == "mount" for namespace in kept):
        kept.append({"type": "mount"})
    kept.append({"type": "pid", "path": pid_namespace} if pid_namespace else {"type": "pid"})
    return kept


def _device_rules(devices: list[Json]) -> list[Json]:
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


def apply_sysctls(values: dict[str, str], root: str = "/proc/sys") -> None:
    """Write kernel settings. Raises InvalidRequest naming the one that is unknown or refused."""
    for name, value in values.items():
        path = name if "/" in name else name.replace(".", "/")
        if ".." in path.split("/"):
            raise InvalidRequest(f"sysctl {name!r} is no name of a setting")
        try:
            with open(f"{root}/{path}", "w") as file:
                file.write(value)
        except OSError as err:
            raise InvalidRequest(f"sysctl {name}={value}: {err.strerror}") from err

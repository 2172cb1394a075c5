"""What the guest changes in a container's specification: namespaces, cgroup, devices, sysctls, and what this guest's
kernel does not have.

The network, the host name and System V IPC belong to the sandbox, and the sandbox is the whole guest: containers
join the namespaces of PID 1. Settings of the kernel that live in those namespaces are the guest's, so the agent
writes them itself; an engine refuses them for a container that does not have the namespace to itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guest_agent import devices
from guest_agent.cgroup import PARENT
from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from guest_agent.oci import Json

_SHARED = {"ipc": "/proc/1/ns/ipc", "uts": "/proc/1/ns/uts"}
_NOT_IN_GUEST = frozenset({"network", "time"})
_KIB = {"KB": 1, "MB": 1024, "GB": 1024 * 1024}
_V1_LIMITS = {
    "memory": ("kernel", "kernelTCP", "swappiness", "disableOOMKiller"),
    "cpu": ("realtimeRuntime", "realtimePeriod"),
    "network": ("classID", "priorities"),
}


def adapt(config: Json, container_id: str, pid_namespace: str, sys: str = "/sys") -> list[str]:
    """Adapt a specification to this guest, in place. `pid_namespace` is a path to join, empty for a new one.

    Returns what was asked for and is left out, because nothing in this guest could enforce it.
    Raises InvalidRequest for a sysctl that the kernel refuses, and for a device that is not here.
    """
    linux = config.setdefault("linux", {})
    assert isinstance(linux, dict)
    linux["namespaces"] = _namespaces(linux.get("namespaces") or [], pid_namespace)
    linux["cgroupsPath"] = f"{PARENT}/{container_id}"
    config.pop("hostname", None)  # the sandbox's, set by PID 1
    resources = linux.setdefault("resources", {})
    devices.adapt(linux, sys)
    _keep_page_sizes(resources, sys)
    process = config["process"]
    assert isinstance(process, dict)
    dropped = [*drop_missing_security(process, sys), *drop_v1_limits(resources)]
    if linux.get("mountLabel") and not _has_selinux(sys):
        dropped.append(f"mountLabel {linux.pop('mountLabel')}")
    apply_sysctls(linux.pop("sysctl", None) or {})
    return dropped


def drop_missing_security(process: Json, sys: str = "/sys") -> list[str]:
    """Take out an AppArmor profile or an SELinux label that the guest's kernel does not have, and name them."""
    dropped = []
    known = {
        "apparmorProfile": _has_profile(process.get("apparmorProfile"), sys),
        "selinuxLabel": _has_selinux(sys),
    }
    for key, present in known.items():
        if process.get(key) and not present:
            dropped.append(f"{key} {process.pop(key)}")
    return dropped


def drop_v1_limits(resources: Json) -> list[str]:
    """Take out, and name, the limits that exist only in the first version of cgroups."""
    dropped = []
    for group, keys in _V1_LIMITS.items():
        limits = resources.get(group) or {}
        assert isinstance(limits, dict)
        dropped += [f"{group}.{key} {limits.pop(key)}" for key in keys if key in limits]
    return dropped


def _keep_page_sizes(resources: Json, sys: str) -> None:
    """A limit on huge pages of a size that the guest does not have limits nothing, and has no file to be written to."""
    limits = resources.get("hugepageLimits") or []
    assert isinstance(limits, list)
    if limits:
        directory = f"{sys}/kernel/mm/hugepages"
        names = os.listdir(directory) if os.path.isdir(directory) else []
        kib = {int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names}
        resources["hugepageLimits"] = [limit for limit in limits if _page_kib(str(limit["pageSize"])) in kib]


def _page_kib(size: str) -> int:
    """ "2MB" are 2048 KiB; 0 for what is no size."""
    number, unit = size[:-2], size[-2:]
    return int(number) * _KIB[unit] if number.isdecimal() and unit in _KIB else 0


def _has_profile(name: object, sys: str) -> bool:
    """Whether AppArmor knows the profile; one that is not loaded cannot be entered, and the host's are the host's."""
    try:
        with open(f"{sys}/kernel/security/apparmor/profiles") as file:
            return any(line.rpartition(" (")[0] == name for line in file)
    except FileNotFoundError:
        return False


def _has_selinux(sys: str) -> bool:
    return os.path.isdir(f"{sys}/fs/selinux")


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

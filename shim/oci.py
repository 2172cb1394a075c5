"""From the bundle's OCI JSON to the spec that the guest's agent gets: conversion, then the edits that a VM needs.

What belongs to the host (its hooks, host cgroup devices, network and PID namespaces, host paths of mounts) is taken out
or rewritten here, so that nothing of the host's layout is ever told to the guest.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import structlog

from agent_proto import oci_json
from agent_proto.gen import agent_pb2, oci_pb2
from shim import mounts
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from google.protobuf.message import Message

    from config.schema import SharedMount

log = structlog.get_logger()

# Data of the whole guest, which has them on a disk; there may be much of it.
_INITDATA = "io.katacontainers.config.hypervisor.cc_init_data"
CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"
BUNDLE_PATH = "io.katacontainers.pkg.oci.bundle_path"
# Namespaces that the guest provides itself, as one machine per sandbox.
_HOST_NAMESPACES = ("pid", "network", "time")
# The host's mode of cgroups decides whether a spec asks for this one. The guest always has version 2, where a container
# finds its own limits, by which many programs size themselves, at the root of its own namespace only.
_CGROUP_NAMESPACE = "cgroup"
SWAPPINESS = "io.katacontainers.container.resource.swappiness"
SWAP_IN_BYTES = "io.katacontainers.container.resource.swap_in_bytes"
# What containers ask for by annotations and no guest has.
_REFUSED_ANNOTATIONS = {
    "sgx.intel.com/epc": "guests have no SGX memory",
}
_THROTTLES = (
    "ThrottleReadBpsDevice", "ThrottleWriteBpsDevice", "ThrottleReadIOPSDevice", "ThrottleWriteIOPSDevice",
)  # fmt: skip
_NOTIFY = "SCMP_ACT_NOTIFY"
# Containers' names in annotations, of containerd and of CRI-O.
_NAMES = ("io.kubernetes.cri.container-name", "io.kubernetes.cri-o.ContainerName")
# Volumes that a kubelet changes while containers use them. Its directory may be anywhere (--root-dir); what is below a
# pod's is always this.
_KUBELETS = re.compile(
    r"/pods/[^/]+/volumes/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+/?\Z"
)
_EPHEMERAL_DIR = "/run/kata-containers/sandbox/ephemeral"
# Of a limit's size of pages (runtime-spec config-linux.md, "Huge page limits").
_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_EMPTY_DIRS = re.compile(r"/pods/[^/]+/volumes/kubernetes\.io~empty-dir/[^/]+/?\Z")


def process_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.Process:
    """An OCI process, as `Exec` carries it.

    Raises:
        InvalidRequest: a value has the wrong type; names the JSON path.
    """
    message = oci_pb2.Process()
    _fill(message, raw, where)
    _drop_host_labels(message)
    return message


def resources_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.LinuxResources:
    """OCI Linux resources, as `Update` carries them, unedited. Raises InvalidRequest as above."""
    message = oci_pb2.LinuxResources()
    _fill(message, raw, where)
    return message


def drop_host_resources(
    resources: oci_pb2.LinuxResources, disks: Collection[tuple[int, int]] = frozenset()
) -> None:
    """Device numbers, I/O weights and net classes name the host's devices; CPUs and memory nodes are the host's too.

    `disks` are the numbers of those of the host's block devices that the guest gets, and finds its own numbers for.
    """
    privileged = allows_every_device(resources)
    _keep_throttles(resources, disks)
    for field in ("Devices", "Network"):
        resources.ClearField(field)
    if privileged:
        resources.Devices.add(Allow=True, Type="a", Access="rwm")
    if resources.HasField("CPU"):  # else naming it would make it, with limits of 0
        resources.CPU.Cpus = resources.CPU.Mems = ""


def _keep_throttles(resources: oci_pb2.LinuxResources, disks: Collection[tuple[int, int]]) -> None:
    """Leave the limits of block I/O that are about the guest's disks."""
    given = resources.BlockIO
    kept = oci_pb2.LinuxBlockIO()
    for name in _THROTTLES:
        limits = getattr(given, name)
        getattr(kept, name).extend(limit for limit in limits if (limit.Major, limit.Minor) in disks)
    if resources.HasField("BlockIO") and kept != given:
        log.info("limits_of_block_io_left_out", asked=given.ByteSize(), kept=kept.ByteSize())
    resources.ClearField("BlockIO")
    if kept.ByteSize():
        resources.BlockIO.CopyFrom(kept)


def allows_every_device(resources: oci_pb2.LinuxResources) -> bool:
    """Whether the last rule about all devices allows them: so it is for privileged containers."""
    # An absent number is 0 in the message, and -1 means the same.
    about_all = [
        rule for rule in resources.Devices if rule.Type in ("", "a") and max(rule.Major, rule.Minor) <= 0
    ]
    return bool(about_all) and about_all[-1].Allow


def spec_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.Spec:
    """A whole OCI spec, unedited. Raises InvalidRequest as above."""
    message = oci_pb2.Spec()
    _fill(message, raw, where)
    return message


def check(spec: oci_pb2.Spec, *, swap: bool = False) -> None:
    """To be asked before anything is prepared for the container. `swap` says that guests may have that.

    Raises:
        InvalidRequest: it asks for what no container has in a virtual machine.
    """
    if any(ns.Type == "user" for ns in spec.Linux.Namespaces):
        raise InvalidRequest(
            "user namespaces are not supported: the virtual machine keeps the container's users apart from the host's; "
            "run it without (Kubernetes: hostUsers: true)"
        )
    for name, why in _REFUSED_ANNOTATIONS.items():
        if name in spec.Annotations:
            raise InvalidRequest(f"annotation {name}: not supported in this version: {why}; remove it")
    for name in () if swap else (SWAPPINESS, SWAP_IN_BYTES):
        if name in spec.Annotations:
            raise InvalidRequest(
                f"annotation {name}: the guest has no swap; set enable_guest_swap of [hypervisor.qemu], or remove it"
            )


def shared_mounts(spec: oci_pb2.Spec, configured: Iterable[SharedMount]) -> list[agent_pb2.SharedMount]:
    """Those of the configured mounts that the container sees, by the name that it has in its pod."""
    named = next((spec.Annotations[key] for key in _NAMES if key in spec.Annotations), "")
    return [
        agent_pb2.SharedMount(
            name=mount.name,
            src_ctr=mount.src_ctr,
            src_path=mount.src_path,
            dst_ctr=mount.dst_ctr,
            dst_path=mount.dst_path,
        )
        for mount in configured
        if named and mount.dst_ctr == named
    ]


def edit_for_guest(
    spec: oci_pb2.Spec,
    *,
    rootfs: str,
    container_type: str,
    bundle: str,
    keep_seccomp: bool,
    disks: Collection[tuple[int, int]] = frozenset(),
) -> bool:
    """Make a spec fit for the guest; returns whether the container joins the sandbox's PID namespace.

    `disks` as in `drop_host_resources`.
    """
    spec.Root.Path = rootfs
    hooks = oci_pb2.Hooks(StartContainer=spec.Hooks.StartContainer)
    spec.ClearField("Hooks")
    if hooks.StartContainer:  # a program of the container's own
        spec.Hooks.CopyFrom(hooks)
    for key, value in ((CONTAINER_TYPE, container_type), (BUNDLE_PATH, bundle)):
        if key not in spec.Annotations:
            spec.Annotations[key] = value
    spec.Annotations.pop(_INITDATA, None)
    linux = spec.Linux
    if not keep_seccomp:
        linux.ClearField("Seccomp")
    if any(rule.Action == _NOTIFY for rule in linux.Seccomp.Syscalls):
        raise InvalidRequest(
            f"linux.seccomp: {_NOTIFY}: the program that would be asked is on the host, where no guest reaches it; use "
            "a profile without it"
        )
    joins_pidns = any(ns.Type == "pid" and ns.Path for ns in linux.Namespaces)
    kept = [
        oci_pb2.LinuxNamespace(Type=ns.Type) for ns in linux.Namespaces if ns.Type not in _HOST_NAMESPACES
    ]
    if not any(ns.Type == _CGROUP_NAMESPACE for ns in kept):
        kept.append(oci_pb2.LinuxNamespace(Type=_CGROUP_NAMESPACE))
    del linux.Namespaces[:]
    linux.Namespaces.extend(kept)
    drop_host_resources(linux.Resources, disks)
    if allows_every_device(linux.Resources) and linux.Devices:
        # All of the host's. The agent gives such a container the guest's instead.
        log.info("host_devices_left_out", devices=len(linux.Devices))
        linux.ClearField("Devices")
    process = spec.Process
    if process.SelinuxLabel or process.ApparmorProfile:
        log.info("security_labels_left_out", selinux=process.SelinuxLabel, apparmor=process.ApparmorProfile)
    _drop_host_labels(process)
    linux.MountLabel = ""
    return joins_pidns


def _drop_host_labels(process: oci_pb2.Process) -> None:
    """Take out the names of the host's security profiles: neither SELinux nor AppArmor has them in the guest."""
    process.SelinuxLabel = process.ApparmorProfile = ""


def is_pods_shm(mount: oci_pb2.Mount, ids: Collection[str]) -> bool:
    """Whether a mount stands for the pod's /dev/shm, which is the guest's, and is no volume that the user wants there.

    `ids` are the sandbox's and the container's: engines keep the shm that they bind in a directory named by one of
    these. That of the host stands for the pod's as well.
    """
    if mount.destination != "/dev/shm" or mount.type == "ephemeral":  # noqa: S108 - the container's
        return False
    if not is_bind(mount) or mount.source == "/dev/shm":  # noqa: S108
        return True
    *parents, name = mount.source.split("/")
    return name == "shm" and not set(ids).isdisjoint(parents)


def is_bind(mount: oci_pb2.Mount) -> bool:
    """Whether it is a bind mount, in any of the ways to say that."""
    return mount.type == "bind" or not {"bind", "rbind"}.isdisjoint(mount.options)


def is_kubelets(source: str, options: Collection[str]) -> bool:
    """Whether a bind mount is of a directory that a kubelet changes, and the container cannot."""
    return "ro" in options and _KUBELETS.search(source) is not None


def huge_pages_storage(source: str, place: str, spec: oci_pb2.Spec) -> agent_pb2.Storage | None:
    """What the guest mounts for an `emptyDir` of huge pages, None for any other source. The pages are the guest's, as
    many as the container may have of that size; files in them stay as long as the pod. `place` is where this process
    has it.

    Raises:
        OSError: the source cannot be looked at.
    """
    page_bytes = mounts.huge_page_bytes(place) if _EMPTY_DIRS.search(source) else 0
    if not page_bytes:
        return None
    limits = spec.Linux.Resources.HugepageLimits
    wanted = sum(limit.Limit for limit in limits if _page_bytes(limit.Pagesize) == page_bytes)
    owner = os.stat(place)
    return agent_pb2.Storage(
        driver="ephemeral",
        source="nodev",
        fstype="hugetlbfs",
        options=[
            f"pagesize={page_bytes},size={wanted}",
            f"mode={owner.st_mode & 0o1777:o}",
            f"uid={owner.st_uid}",
            # The group that a kubelet has given it (fsGroup) gets all that is made in it.
            *([f"fsgid={owner.st_gid}"] if owner.st_gid else []),
        ],
        mount_point=f"{_EPHEMERAL_DIR}/{os.path.basename(source.rstrip('/'))}",
        shared=True,
    )


def _page_bytes(size: str) -> int:
    """ "2MB" as bytes; 0 for what is no size."""
    number, unit = size[:-2], size[-2:]
    return int(number) * _UNITS[unit] if number.isdecimal() and unit in _UNITS else 0


def _fill(message: Message, raw: dict[str, Any], where: str) -> None:
    try:
        oci_json.fill(message, raw, where)
    except oci_json.OciError as err:
        raise InvalidRequest(str(err)) from err

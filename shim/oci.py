"""From the bundle's OCI JSON to the spec that the guest's agent gets: conversion, then the edits that a VM needs.

What belongs to the host (hooks, host cgroup devices, network and PID namespaces, host paths of mounts) is taken out or
rewritten here, so that nothing of the host's layout is ever told to the guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent_proto import oci_json
from agent_proto.gen import oci_pb2
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from google.protobuf.message import Message

CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"
BUNDLE_PATH = "io.katacontainers.pkg.oci.bundle_path"
# Namespaces that the guest provides itself, as one machine per sandbox.
_HOST_NAMESPACES = ("pid", "network", "time")


def process_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.Process:
    """An OCI process, as `Exec` carries it.

    Raises:
        InvalidRequest: a value has the wrong type; names the JSON path.
    """
    message = oci_pb2.Process()
    _fill(message, raw, where)
    return message


def resources_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.LinuxResources:
    """OCI Linux resources, as `Update` carries them, without the host's. Raises InvalidRequest as above."""
    message = oci_pb2.LinuxResources()
    _fill(message, raw, where)
    _drop_host_resources(message)
    return message


def _drop_host_resources(resources: oci_pb2.LinuxResources) -> None:
    """Device numbers, I/O weights and net classes name the host's devices; CPUs and memory nodes are the host's too."""
    for field in ("Devices", "BlockIO", "Network"):
        resources.ClearField(field)
    resources.CPU.Cpus = resources.CPU.Mems = ""


def spec_to_proto(raw: dict[str, Any], where: str) -> oci_pb2.Spec:
    """A whole OCI spec, unedited. Raises InvalidRequest as above."""
    message = oci_pb2.Spec()
    _fill(message, raw, where)
    return message


def edit_for_guest(
    spec: oci_pb2.Spec, *, rootfs: str, container_type: str, bundle: str, keep_seccomp: bool
) -> bool:
    """Make a spec fit for the guest; returns whether the container joins the sandbox's PID namespace."""
    spec.Root.Path = rootfs
    spec.ClearField("Hooks")
    for key, value in ((CONTAINER_TYPE, container_type), (BUNDLE_PATH, bundle)):
        if key not in spec.Annotations:
            spec.Annotations[key] = value
    linux = spec.Linux
    if not keep_seccomp:
        linux.ClearField("Seccomp")
    joins_pidns = any(ns.Type == "pid" and ns.Path for ns in linux.Namespaces)
    kept = [
        oci_pb2.LinuxNamespace(Type=ns.Type) for ns in linux.Namespaces if ns.Type not in _HOST_NAMESPACES
    ]
    del linux.Namespaces[:]
    linux.Namespaces.extend(kept)
    _drop_host_resources(linux.Resources)
    spec.Process.SelinuxLabel = ""
    linux.MountLabel = ""
    return joins_pidns


def _fill(message: Message, raw: dict[str, Any], where: str) -> None:
    try:
        oci_json.fill(message, raw, where)
    except oci_json.OciError as err:
        raise InvalidRequest(str(err)) from err

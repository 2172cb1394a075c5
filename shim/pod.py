"""What a virtual machine must know of its pod: from the spec of the pod's first container, or from CRI itself when
containerd uses the Sandbox API and there is no such container."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from config import PodResources
from shim.bundle import Bundle
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.api.gen.pod_pb2 import DNSConfig
    from shim.api.gen.sandbox_pb2 import CreateSandboxRequest

log = structlog.get_logger()

RESOLV_CONF = "/etc/resolv.conf"
_CRI_CONFIG = "runtime.v1.PodSandboxConfig"
# containerd's annotations of a pod's first container: microseconds of CPU time, of how many, and bytes of memory.
_LIMITS = tuple(f"io.kubernetes.cri.sandbox-{name}" for name in ("cpu-quota", "cpu-period", "memory"))
# The annotations with a pod's name and its namespace, of containerd and of CRI-O.
_NAMES = (
    ("io.kubernetes.cri.sandbox-name", "io.kubernetes.cri-o.KubeName"),
    ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri-o.Namespace"),
)
# Ten times what any resolver reads; the rest of a larger file is left out.
_RESOLV_CONF_LIMIT = 65536
# Bytes, or a part of the memory, which is then the guest's.
_TMPFS_SIZE = re.compile("[0-9]{1,18}[kKmMgG%]?")


@dataclass(frozen=True, kw_only=True)
class Pod:
    """`name` and `namespace` are Kubernetes's, empty without it, `dns` are the lines of resolv.conf, `netns` is None
    for "make a new one" and with `host_network`, `sysctls` are the guest's, `annotations` all that the pod has,
    `resources` its limits, `cgroup` its control group as an OCI spec names it, `shm_size` the size of /dev/shm in the
    words of tmpfs(5)."""

    name: str = ""
    namespace: str = ""
    hostname: str = ""
    dns: tuple[str, ...] = ()
    netns: Path | None = None
    host_network: bool = False
    sysctls: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    cgroup: str = ""
    resources: PodResources = field(default_factory=PodResources)
    shm_size: str = "64m"


def pod_from_bundle(bundle: Bundle) -> Pod:
    """The pod as the spec of its first container has it; that container brings its own sysctls.

    Raises:
        InvalidRequest: limits that are no numbers.
    """
    dns = dns_of(bundle)
    annotations = bundle.spec.annotations
    name, namespace = (next((annotations[key] for key in keys if key in annotations), "") for keys in _NAMES)
    return Pod(
        name=name,
        namespace=namespace,
        hostname=_hostname(bundle),
        dns=dns,
        netns=bundle.spec.netns,
        host_network=not any(namespace.type == "network" for namespace in bundle.spec.linux.namespaces),
        annotations=annotations,
        cgroup=bundle.spec.linux.cgroups_path,
        resources=_limits_of(bundle),
        shm_size=_shm_size(bundle) or Pod.shm_size,
    )


def dns_of(bundle: Bundle) -> tuple[str, ...]:
    """The lines of the resolv.conf that a container brings, as the file is now; none when it brings none."""
    mounted = (
        mount.source for mount in bundle.spec.mounts if mount.destination == RESOLV_CONF and mount.source
    )
    source = next(mounted, None)
    return _lines_of(source) if source else ()


def pod_from_request(request: CreateSandboxRequest) -> Pod:
    """The pod as `CreateSandbox` describes it: by CRI's configuration, or by an OCI spec in the bundle.

    Raises:
        InvalidRequest: a description that cannot be read.
    """
    if request.options.type_url.rpartition("/")[2] == _CRI_CONFIG:
        pod = _pod_from_cri(request.options.value, request.sandbox_id)
    elif Path(request.bundle_path, "config.json").exists():
        pod = pod_from_bundle(Bundle.load(request.sandbox_id, Path(request.bundle_path)))
    else:
        pod = Pod(dns=_lines_of(RESOLV_CONF))
    netns = Path(request.netns_path) if request.netns_path else pod.netns
    pod = replace(pod, netns=netns, host_network=netns is None)
    return replace(pod, hostname=pod.hostname or socket.gethostname())


def write_etc(pod: Pod, folder: Path) -> dict[str, Path]:
    """Write the files of /etc that a pod's containers share, each under the path that containers find it at.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {
        "/etc/hostname": pod.hostname,
        "/etc/hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{pod.hostname}",
        RESOLV_CONF: "\n".join(pod.dns),
    }
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    files = {}
    for destination, text in texts.items():
        files[destination] = folder / Path(destination).name
        files[destination].write_text(f"{text.rstrip()}\n")
    return files


def _limits_of(bundle: Bundle) -> PodResources:
    """The limits of the pod, where annotations tell them, else those of the container, which is all there is then."""
    annotations, own = bundle.spec.annotations, bundle.spec.linux.resources
    if not annotations.keys() & set(_LIMITS):
        return PodResources(own.cpu.quota, own.cpu.period, own.memory.limit)
    try:
        return PodResources(*(int(annotations.get(name, "0")) for name in _LIMITS))
    except ValueError as err:
        raise InvalidRequest(
            f"container {bundle.container_id}: annotations with the pod's limits: {err}"
        ) from err


def _shm_size(bundle: Bundle) -> str:
    """The size that an engine has given /dev/shm: of a tmpfs that the container is to mount, or of one that the engine
    has mounted itself, in a directory `shm` of the container or of the pod. Empty when none is told."""
    for mount in reversed(bundle.spec.mounts):
        if mount.destination != "/dev/shm":  # noqa: S108 - the container's
            continue
        if mount.type == "tmpfs":
            sizes = [option[5:] for option in mount.options or () if option.startswith("size=")]
            return sizes[-1] if sizes and _TMPFS_SIZE.fullmatch(sizes[-1]) else ""
        if mount.source.endswith("/shm") and mount.source != "/dev/shm" and os.path.ismount(mount.source):  # noqa: S108
            tmpfs = os.statvfs(mount.source)
            return str(tmpfs.f_blocks * tmpfs.f_frsize) if tmpfs.f_blocks else ""
    return ""


def _hostname(bundle: Bundle) -> str:
    """A spec without a UTS namespace shares the host's, and with it the name: so do pods on the host's network."""
    own = any(namespace.type == "uts" for namespace in bundle.spec.linux.namespaces)
    return bundle.spec.hostname or ("" if own else socket.gethostname())


def _cgroup_below(parent: str, sandbox_id: str) -> str:
    """The group of a pod without a first container, as containerd names that of one."""
    if parent.endswith(".slice"):
        return f"{parent}:kata-py:{sandbox_id}"
    return f"{parent}/{sandbox_id}" if parent else ""


def _pod_from_cri(packed: bytes, sandbox_id: str) -> Pod:
    from google.protobuf.message import DecodeError

    from shim.api.gen.pod_pb2 import PodSandboxConfig

    try:
        config = PodSandboxConfig.FromString(packed)
    except DecodeError as err:
        raise InvalidRequest(f"the options of CreateSandbox are not a {_CRI_CONFIG}: {err}") from err
    dns = _resolv_conf(config.dns_config) if config.HasField("dns_config") else ()
    limits = config.linux.resources
    return Pod(
        name=config.metadata.name,
        namespace=config.metadata.namespace,
        hostname=config.hostname,
        dns=dns or _lines_of(RESOLV_CONF),
        sysctls=dict(config.linux.sysctls),
        annotations=dict(config.annotations),
        cgroup=_cgroup_below(config.linux.cgroup_parent, sandbox_id),
        resources=PodResources(limits.cpu_quota, limits.cpu_period, limits.memory_limit_in_bytes),
    )


def _resolv_conf(dns: DNSConfig) -> tuple[str, ...]:
    """The lines of resolv.conf(5)."""
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.insert(0, f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return tuple(lines)


def _lines_of(path: str) -> tuple[str, ...]:
    try:
        with open(path) as file:
            return tuple(file.read(_RESOLV_CONF_LIMIT).split("\n"))
    except (OSError, UnicodeDecodeError) as err:
        log.warning("resolv_conf_unreadable", path=path, error=str(err))
        return ()

"""What a machine learns of its pod, from either source."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.any_pb2 import Any

from config import PodResources
from shim import mounts
from shim.api.gen import pod_pb2
from shim.api.gen.sandbox_pb2 import CreateSandboxRequest
from shim.bundle import Bundle
from shim.errors import InvalidRequest
from shim.pod import Pod, pod_from_bundle, pod_from_request, write_etc
from tests.support.namespaces import in_mount_namespace

if TYPE_CHECKING:
    from collections.abc import Mapping


def bundle_with(tmp_path: Path, config: Mapping[str, object]) -> Bundle:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Bundle.load("c", tmp_path)


def cri(config: pod_pb2.PodSandboxConfig, prefix: str = "") -> Any:
    return Any(type_url=f"{prefix}runtime.v1.PodSandboxConfig", value=config.SerializeToString())


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"nameserver 1.2.3.4\noptions edns0\n", ("nameserver 1.2.3.4", "options edns0", "")),
        (b"", ("",)),
        (b"\xff\xfe", ()),
        (None, ()),
    ],
    ids=["text", "empty", "binary", "missing"],
)
def test_from_a_spec(tmp_path: Path, content: bytes | None, lines: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "resolv").write_bytes(content)
    mount = {"destination": "/etc/resolv.conf", "type": "bind", "source": str(tmp_path / "resolv")}
    namespace = {"type": "network", "path": "/run/netns/p"}
    config = {"hostname": "h", "mounts": [mount], "linux": {"namespaces": [namespace]}}
    pod = pod_from_bundle(bundle_with(tmp_path, config))
    assert pod == Pod(hostname="h", dns=lines, netns=Path("/run/netns/p"))


def test_from_an_empty_spec(tmp_path: Path) -> None:
    config = {"linux": {"namespaces": [{"type": "uts"}, {"type": "network"}]}}
    assert pod_from_bundle(bundle_with(tmp_path, config)) == Pod()


@pytest.mark.parametrize(
    ("mount", "size"),
    [
        ({"type": "tmpfs", "source": "shm", "options": ["nosuid", "size=65536k"]}, "65536k"),
        ({"type": "tmpfs", "source": "shm", "options": ["size=1m", "size=2g"]}, "2g"),
        ({"type": "tmpfs", "source": "shm", "options": ["size=50%"]}, "50%"),
        ({"type": "tmpfs", "source": "shm", "options": ["size=-1"]}, "64m"),
        ({"type": "tmpfs", "source": "shm", "options": ["size=1,noexec"]}, "64m"),
        ({"type": "tmpfs", "source": "shm"}, "64m"),
        # The host's own, and what is no mount of an engine's, tell nothing.
        ({"type": "bind", "source": "/dev/shm", "options": ["rbind"]}, "64m"),
        ({"type": "bind", "source": "@/shm", "options": ["rbind"]}, "64m"),
        ({"type": "bind", "source": "/nowhere/shm", "options": ["rbind"]}, "64m"),
    ],
)
def test_shared_memory(tmp_path: Path, mount: dict[str, object], size: str) -> None:
    (tmp_path / "shm").mkdir()
    mount = {**mount, "source": str(mount["source"]).replace("@", str(tmp_path))}
    config = {"mounts": [{"destination": "/proc", "type": "proc"}, {"destination": "/dev/shm", **mount}]}
    assert pod_from_bundle(bundle_with(tmp_path, config)).shm_size == size


def test_shared_memory_of_an_engine(tmp_path: Path) -> None:
    """A tmpfs that is mounted already."""
    (tmp_path / "shm").mkdir()
    mount = {"destination": "/dev/shm", "type": "bind", "source": str(tmp_path / "shm"), "options": ["rbind"]}

    def inside() -> None:
        mounts.mount("shm", str(tmp_path / "shm"), "tmpfs", 0, "size=100m")
        assert pod_from_bundle(bundle_with(tmp_path, {"mounts": [mount]})).shm_size == str(100 << 20)

    in_mount_namespace(inside)


def test_spec_with_the_hosts_name(tmp_path: Path) -> None:
    """Without a UTS namespace of its own, as a pod in the host's network has none, it has the host's name."""
    assert pod_from_bundle(bundle_with(tmp_path, {})).hostname == socket.gethostname()


@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/"])
def test_from_cri(prefix: str) -> None:
    limits = pod_pb2.LinuxContainerResources(cpu_period=2, cpu_quota=1, memory_limit_in_bytes=3)
    config = pod_pb2.PodSandboxConfig(
        hostname="web",
        dns_config=pod_pb2.DNSConfig(servers=["1.1.1.1"], options=["ndots:1", "rotate"]),
        linux=pod_pb2.LinuxPodSandboxConfig(sysctls={"a.b": "1"}, resources=limits),
        annotations={"io.katacontainers.x": "y"},
    )
    pod = pod_from_request(CreateSandboxRequest(options=cri(config, prefix), netns_path="/run/netns/p"))
    dns = ("nameserver 1.1.1.1", "options ndots:1 rotate")
    assert pod == Pod(
        hostname="web",
        dns=dns,
        netns=Path("/run/netns/p"),
        sysctls={"a.b": "1"},
        annotations={"io.katacontainers.x": "y"},
        resources=PodResources(1, 2, 3),
    )


def test_netns_of_the_request_counts_for_more_than_the_specs(tmp_path: Path) -> None:
    namespace = {"type": "network", "path": "/run/netns/spec"}
    bundle_with(tmp_path, {"hostname": "h", "linux": {"namespaces": [namespace]}})
    request = CreateSandboxRequest(sandbox_id="c", bundle_path=str(tmp_path))
    assert pod_from_request(request).netns == Path("/run/netns/spec")
    request.netns_path = "/run/netns/request"
    assert pod_from_request(request) == Pod(hostname="h", netns=Path("/run/netns/request"))


def test_unknown_description(tmp_path: Path) -> None:
    """Options of a client that we do not know say nothing to us, as if there were none."""
    options = Any(type_url="somebody.elses.Config", value=b"\xff")
    pod = pod_from_request(CreateSandboxRequest(bundle_path=str(tmp_path), options=options))
    assert (pod.hostname, pod.netns, pod.sysctls) == (socket.gethostname(), None, {})


def test_broken_descriptions(tmp_path: Path) -> None:
    broken = Any(type_url="runtime.v1.PodSandboxConfig", value=b"\x12\xff")
    with pytest.raises(
        InvalidRequest, match=r"options of CreateSandbox are not a runtime\.v1\.PodSandboxConfig"
    ):
        pod_from_request(CreateSandboxRequest(options=broken))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="not an OCI runtime spec"):
        pod_from_request(CreateSandboxRequest(sandbox_id="c", bundle_path=str(tmp_path)))


def test_files_of_etc(tmp_path: Path) -> None:
    files = write_etc(Pod(hostname="web", dns=("nameserver 1.1.1.1", "")), tmp_path / "etc")
    assert {path: file.read_text() for path, file in files.items()} == {
        "/etc/hostname": "web\n",
        "/etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tweb\n",
        "/etc/resolv.conf": "nameserver 1.1.1.1\n",
    }


CRI = "io.kubernetes.cri.sandbox-"
OWN = {"cpu": {"quota": 1, "period": 2, "shares": 5}, "memory": {"limit": 3}}


@pytest.mark.parametrize(
    ("annotations", "limits"),
    [
        ({}, PodResources(1, 2, 3)),
        ({f"{CRI}memory": "7"}, PodResources(0, 0, 7)),
        ({f"{CRI}cpu-quota": "-1", f"{CRI}cpu-period": "6", f"{CRI}memory": "0"}, PodResources(-1, 6, 0)),
    ],
)
def test_limits(tmp_path: Path, annotations: dict[str, str], limits: PodResources) -> None:
    config = {"annotations": annotations, "linux": {"resources": OWN}}
    assert pod_from_bundle(bundle_with(tmp_path, config)).resources == limits


def test_limits_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="container c: annotations with the pod's limits"):
        pod_from_bundle(bundle_with(tmp_path, {"annotations": {f"{CRI}memory": "much"}}))

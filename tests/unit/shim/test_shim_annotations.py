"""The annotations that are not about the configuration: each is read, refused by name, or handed on to the agent."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from config.annotations import is_ours
from config.schema import SharedMount
from shim import oci, paths
from shim.api.gen.types_pb2 import Mount
from shim.bundle import Bundle
from shim.errors import InvalidRequest
from shim.pod import pod_from_bundle
from shim.share import SharedDir
from tests.unit.config.test_config_annotations import CONFIGURED, KNOWN

if TYPE_CHECKING:
    from pathlib import Path

# They say which pod a container belongs to, or go with one that does.
POD = {
    "io.kubernetes.cri.container-type": "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.ContainerType": "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.docker.type": "io.kubernetes.sandbox.id",
}
LIMITS = {
    "io.kubernetes.cri.sandbox-cpu-quota": "cpu_quota",
    "io.kubernetes.cri.sandbox-cpu-period": "cpu_period",
    "io.kubernetes.cri.sandbox-memory": "memory_bytes",
}
NAMES = ("io.kubernetes.cri.container-name", "io.kubernetes.cri-o.ContainerName")
SWAP = (
    "io.katacontainers.container.resource.swappiness",
    "io.katacontainers.container.resource.swap_in_bytes",
)
REFUSED = ("sgx.intel.com/epc",)
OPTIONS_OF_MOUNTS = (
    "io.katacontainers.volume=",
    "io.katacontainers.volume.overlayfs.create_directory",
    "io.katacontainers.fs-opt.layer=",
    "io.katacontainers.fs-opt.is-layer",
    "io.katacontainers.fs-opt.block_device=file",
    "io.katacontainers.fs-opt.overlay-rw",
)
WRITTEN_BY_US = (oci.CONTAINER_TYPE, oci.BUNDLE_PATH)
# Kata's agent reads some of these, others are for nobody: termination logs are files of the pod, and containerd has put
# devices (CDI) into the container's spec.
FOR_THE_AGENT = (
    "io.kubernetes.cri.sandbox-name",
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-uid",
    "io.kubernetes.cri.sandbox-log-directory",
    "io.kubernetes.cri.sandbox-cpu-shares",
    "io.kubernetes.cri.image-name",
    "io.kubernetes.cri-o.KubeName",
    "io.kubernetes.cri-o.Namespace",
    "io.kubernetes.cri-o.ImageName",
    "io.kubernetes.container.terminationMessagePolicy",
    "io.kubernetes.container.terminationMessagePath",
    "nerdctl/network-namespace",
    "cdi.k8s.io/<anything>",
)


def test_every_known_annotation_has_a_place() -> None:
    placed = (
        *POD,
        *POD.values(),
        *LIMITS,
        *NAMES,
        *SWAP,
        *REFUSED,
        *OPTIONS_OF_MOUNTS,
        *WRITTEN_BY_US,
        *FOR_THE_AGENT,
    )
    assert sorted(placed) == sorted(set(KNOWN) - set(CONFIGURED))


@pytest.mark.parametrize("kind", POD)
def test_the_pod_of_a_container(kind: str) -> None:
    assert paths.sandbox_of({kind: "container", POD[kind]: "pod"}, "c1") == "pod"
    assert paths.sandbox_of({kind: "sandbox", POD[kind]: "pod"}, "c1") == "c1"


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_pod(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"annotations": {{"{name}": "7"}}}}')
    found = pod_from_bundle(Bundle.load("c1", tmp_path)).resources
    assert getattr(found, LIMITS[name]) == 7
    assert sum(found) == 7


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_container(name: str) -> None:
    spec = oci.spec_to_proto({"annotations": {name: "web"}}, "")
    assert len(oci.shared_mounts(spec, [SharedMount(dst_ctr="web"), SharedMount(dst_ctr="db")])) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_guest_has(name: str) -> None:
    with pytest.raises(
        InvalidRequest, match=f"^annotation {name}: not supported in this version: .*; remove it$"
    ):
        oci.check(oci.spec_to_proto({"annotations": {name: "1"}}, ""))


@pytest.mark.parametrize("name", SWAP)
def test_swap_where_guests_have_it(name: str) -> None:
    spec = oci.spec_to_proto({"annotations": {name: "1"}}, "")
    with pytest.raises(
        InvalidRequest, match=f"^annotation {name}: the guest has no swap; set enable_guest_swap"
    ):
        oci.check(spec)
    oci.check(spec, swap=True)


@pytest.mark.parametrize("option", OPTIONS_OF_MOUNTS)
def test_options_of_mounts_for_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(paths, "SHARED_ROOT", str(tmp_path))
    mount = Mount(type="overlay", source="overlay", options=[option])
    with ExitStack() as undo, pytest.raises(InvalidRequest, match="not supported in this version"):
        SharedDir("s1").add_rootfs("c1", [mount], tmp_path, undo)


@pytest.mark.parametrize("name", [*FOR_THE_AGENT, *WRITTEN_BY_US])
def test_the_agent_gets_it_as_it_is(name: str) -> None:
    spec = oci.spec_to_proto({"annotations": {name: "value"}}, "")
    oci.check(spec)
    oci.edit_for_guest(spec, rootfs="/r", container_type="t", bundle="/b", keep_seccomp=False)
    assert spec.Annotations[name] == "value"
    assert not is_ours(name)

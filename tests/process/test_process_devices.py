"""Containers that ask the real shim for devices of the host: what it looks for on this host, and what it answers.

No host has what is asked for here, so all of this ends in refusals; each comes from another place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bundles import shell, spec
from tests.support.fake_kubelet import kubelet, pod
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_containerd import FakeContainerd

GROUP = "/dev/vfio/4294967295"
ABSENT = "ffff:ff:1f.7"


def with_keys(config: Path, *lines: str, runtime: str = "") -> None:
    text = config.read_text().replace("[hypervisor.qemu]\n", "\n".join(("[hypervisor.qemu]", *lines, "")))
    config.write_text(f"{text}\n[runtime]\n{runtime}\n")


async def refusal(containerd: FakeContainerd, name: str, **more: Any) -> tuple[Code, str]:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("true"), **more)))
    with pytest.raises(RpcError) as caught:
        await shim.create()
    (line,) = str(caught.value).splitlines()
    return caught.value.code, line


def asking_for(path: str) -> dict[str, Any]:
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    return {"namespaces": namespaces, "devices": [{"path": path, "type": "c", "major": 240, "minor": 1}]}


async def test_nothing_is_given_by_default(containerd: FakeContainerd, name: str) -> None:
    code, line = await refusal(containerd, name, linux=asking_for(GROUP))
    assert code is Code.INVALID_ARGUMENT
    assert f"device {GROUP} cannot be given to a guest: set hot_plug_vfio or cold_plug_vfio" in line


@pytest.mark.parametrize("key", ["hot_plug_vfio", "cold_plug_vfio"])
async def test_a_device_that_is_not_there(
    containerd: FakeContainerd, config: Path, name: str, key: str
) -> None:
    with_keys(config, f'{key} = "root-port"')
    code, line = await refusal(containerd, name, linux=asking_for(GROUP))
    assert code is Code.FAILED_PRECONDITION
    assert f"{GROUP}: this host has no IOMMU group 4294967295; look at /sys/kernel/iommu_groups" in line


@pytest.mark.timeout(60)
async def test_the_kubelet_names_a_device_that_is_not_there(
    containerd: FakeContainerd, config: Path, name: str, tmp_path: Path
) -> None:
    """The way to it is all real: the program that asks, gRPC, and this host's /sys."""
    socket = tmp_path / "kubelet.sock"
    with_keys(config, 'cold_plug_vfio = "root-port"', runtime=f'pod_resource_api_sock = "{socket}"')
    annotations = {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": name,
        "io.kubernetes.cri.sandbox-name": "web",
        "io.kubernetes.cri.sandbox-namespace": "prod",
    }
    with kubelet(socket, [pod("web", "prod", devices={"vendor.com/gpu": [ABSENT]})]) as served:
        code, line = await refusal(containerd, name, annotations=annotations)
    assert served.asked == ["Get prod/web"]
    assert code is Code.FAILED_PRECONDITION
    assert f"{ABSENT}: there is no such PCI device (lspci -D lists them)" in line

"""The kubelet is asked, over gRPC, which devices a pod was given."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import kubelet as shim_kubelet
from shim.errors import DevicesUnknown
from shim.kubelet import PodResources, resources_of
from shim.pod import Pod
from tests.support.fake_kubelet import kubelet, pod

if TYPE_CHECKING:
    from shim.api.gen import podresources_pb2 as pb

pytestmark = pytest.mark.timeout(90)
WEB = Pod(name="web", namespace="default")
PODS = [
    pod("web", "other", devices={"vendor.com/gpu": ["9"]}),
    pod(
        "web",
        devices={"vendor.com/gpu": ["0", "1"], "intel.com/nic": ["0000:81:00.1"]},
        claims=["vendor.com/x=y"],
    ),
    pod("bare"),
]
GIVEN = PodResources(
    plugins=(("vendor.com/gpu", "0"), ("vendor.com/gpu", "1"), ("intel.com/nic", "0000:81:00.1")),
    claims=("vendor.com/x=y",),
)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are noisy, and how long something takes is not what is tested."""
    monkeypatch.setattr(shim_kubelet, "_CALL_LIMIT_S", 60.0)
    monkeypatch.setattr(shim_kubelet, "_LIMIT_S", 80.0)


async def refusal(asked_for: Pod, path: Path) -> str:
    with pytest.raises(DevicesUnknown) as caught:
        await resources_of(asked_for, str(path))
    (line,) = str(caught.value).splitlines()
    return line


async def test_a_pod_is_asked_for_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "kubelet.sock"
    with kubelet(path, PODS) as served:
        assert await resources_of(WEB, str(path)) == GIVEN
        assert await resources_of(Pod(name="bare", namespace="default"), str(path)) == PodResources()
    assert served.asked == ["Get default/web", "Get default/bare"]


async def test_one_that_has_only_a_list_is_asked_for_that(tmp_path: Path) -> None:
    path = tmp_path / "kubelet.sock"
    with kubelet(path, PODS, has_get=False) as served:
        assert await resources_of(WEB, str(path)) == GIVEN
        # Static pods are none of the kubelet's devices' concern.
        assert await resources_of(Pod(name="gone", namespace="default"), str(path)) == PodResources()
    assert served.asked == ["List", "List"]


async def test_a_list_of_many_pods(tmp_path: Path) -> None:
    """Longer than what gRPC takes unless it is told otherwise."""
    path = tmp_path / "kubelet.sock"
    many: list[pb.PodResources] = [
        pod(f"pod{n}", devices={f"vendor.com/{'x' * 1000}": ["1"] * 20}) for n in range(4500)
    ]
    with kubelet(path, [*many, PODS[1]], has_get=False):
        assert await resources_of(WEB, str(path)) == GIVEN


async def test_no_kubelet(tmp_path: Path) -> None:
    line = await refusal(WEB, tmp_path / "none")
    assert line.startswith(
        f"pod_resource_api_sock: the kubelet at {tmp_path}/none does not tell the devices of pod default/web: "
        "UNAVAILABLE: "
    )
    assert line.endswith("; correct the key, or look whether the kubelet runs")


async def test_one_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim_kubelet, "_CALL_LIMIT_S", 0.2)
    path = tmp_path / "kubelet.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert ": DEADLINE_EXCEEDED: " in await refusal(WEB, path)


async def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim_kubelet, "_LIMIT_S", 0.2)
    monkeypatch.setattr(shim_kubelet, "_PROGRAM", "import time; time.sleep(60)")
    assert (await refusal(WEB, tmp_path / "s")).endswith("did not answer within 0.2 s")


async def test_without_the_library_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shim_kubelet._PROGRAM.replace("import shim", "sys.modules['grpc'] = None; import shim")
    monkeypatch.setattr(shim_kubelet, "_PROGRAM", program)
    line = await refusal(WEB, tmp_path / "s")
    assert "could not be asked: ModuleNotFoundError: import of grpc halted" in line
    assert line.endswith("; grpcio has to be installed")


@pytest.mark.parametrize("nameless", [Pod(), Pod(name="web"), Pod(namespace="default")])
async def test_a_pod_without_a_name(nameless: Pod) -> None:
    line = await refusal(nameless, Path("/s"))
    assert line.endswith("the pod has no name, as those of Kubernetes have; for others leave the key empty")


async def test_the_daemon_stays_without_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    await refusal(WEB, tmp_path / "none")
    assert threading.active_count() == before

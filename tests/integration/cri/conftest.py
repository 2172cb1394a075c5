"""Fixtures of the pod tests: a private containerd with CRI, in the place of the other integration tests' one.

Environment: KATA_PY_TEST_SANDBOXER=shim lets containerd 2.x manage all pods by the Sandbox API, without a pause
container.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import pytest
from cri_config import CriConfig, Handler
from private_containerd import wait_for_exit

from tests.integration import containerd as support
from tests.integration.cri.client import Cri, CriError
from tests.integration.cri.kubelet import (
    BY_SANDBOX_API,
    HANDLER,
    HOST_DEVICES_HANDLER,
    SANDBOX_API_HANDLER,
    Kubelet,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# CRI puts everything there, whatever the configuration says.
NAMESPACE = "k8s.io"
# Where Debian's containernetworking-plugins has its programs.
NETWORK_PROGRAMS = Path("/usr/lib/cni")
SUBNET = "10.213.0.0/24"
RESTART_TIMEOUT_S = 15.0


@dataclass(kw_only=True)
class CriContainerd(support.Containerd):
    """A private containerd with CRI, and the connection to it."""

    cri: Cri

    def crash_and_restart(self) -> None:
        """Kills containerd, starts it again, and waits until CRI answers."""
        pid = self.server.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert wait_for_exit(pid, RESTART_TIMEOUT_S)
        os.waitpid(pid, 0)
        self.server.start()
        self.cri.wait_until_ready()

    def end_all(self, *, keep: Collection[str]) -> None:
        """Ends containers and pods by CRI's own calls: it keeps books of them."""
        for container in self.cri.containers():
            if container.id not in keep:
                with suppress(CriError):
                    self.cri.remove(container.id)
        for pod in self.cri.pods():
            if pod.id not in keep:
                with suppress(CriError):
                    self.cri.stop_pod(pod.id)
                with suppress(CriError):
                    self.cri.remove_pod(pod.id)
        super().end_all(keep=keep)


@pytest.fixture(scope="session")
def bridge() -> Iterator[str]:
    """A bridge between the pods of this session, on which the host has an address too."""
    name = f"kp{secrets.token_hex(4)}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "link", "delete", name], check=True)


@pytest.fixture(scope="session")
def pods_cgroup() -> Iterator[str]:
    """The control group of all pods of this session."""
    name = f"kp-{secrets.token_hex(4)}"
    support.make_pods_cgroup(name)
    yield name
    support.remove_namespace_cgroups(name)


@pytest.fixture(scope="session")
def containerd(adopted_orphans: None, bridge: str, pods_cgroup: str) -> Iterator[CriContainerd]:
    """A private containerd that speaks CRI, with its images; it and all it started end with the session."""
    with support.running(NAMESPACE) as without_cri:
        server = without_cri.server
        pause = server.folder / "pause.tar"
        busybox_image.build(pause, image=busybox_image.PAUSE)
        server.import_image(pause, snapshotter=without_cri.snapshotter, namespace=NAMESPACE)
        # CRI reads the images when it starts; those that come later it takes in at some later time.
        server.stop()
        kata = Handler(
            runtime_type=support.RUNTIME,
            options={"ConfigPath": str(without_cri.config)},
            # The host's devices are not the guest's.
            settings={"privileged_without_host_devices": True},
        )
        # Without options: containerd before 2.3.4 takes those of such a container for runc's, and fails. The shims
        # learn their configuration from containerd's environment.
        by_sandbox_api = replace(kata, options={}, settings={**kata.settings, "sandboxer": "shim"})
        cri = CriConfig(
            snapshotter=without_cri.snapshotter,
            pause_image=busybox_image.PAUSE.name,
            handlers={
                HANDLER: by_sandbox_api if BY_SANDBOX_API else kata,
                HOST_DEVICES_HANDLER: replace(kata, settings={}),
                **({SANDBOX_API_HANDLER: by_sandbox_api} if server.generation() >= 2 else {}),
            },
            networks=server.folder / "cni",
            network_programs=NETWORK_PROGRAMS,
        )
        write_network(cri.networks, bridge, state=server.folder / "addresses")
        server = replace(server, cri=cri)
        server.start()
        client = Cri(server.socket)
        client.wait_until_ready()
        yield CriContainerd(
            server=server,
            namespace=NAMESPACE,
            snapshotter=without_cri.snapshotter,
            config=without_cri.config,
            cgroup_parent=pods_cgroup,
            cri=client,
        )
        client.close()


def write_network(folder: Path, bridge: str, *, state: Path) -> None:
    """The CNI configuration of the pods' network: an interface on the bridge, with an address of its own, and ports of
    the host that lead to it."""
    folder.mkdir()
    plugin = {
        "type": "bridge",
        "bridge": bridge,
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": SUBNET}]],
            "dataDir": str(state),
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [plugin, ports]}
    (folder / "pods.conflist").write_text(json.dumps(network))


@pytest.fixture(scope="session")
def cri(containerd: CriContainerd) -> Cri:
    """A client of the containerd, which goes on when containerd restarts."""
    return containerd.cri


@pytest.fixture(scope="session")
def kubelet(containerd: CriContainerd) -> Kubelet:
    """Makes pods."""
    return Kubelet(containerd=containerd, cri=containerd.cri, folder=containerd.server.folder)

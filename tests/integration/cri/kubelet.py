"""What a kubelet does with CRI, as far as the tests need it: pods, their containers, and waiting for them."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import busybox_image

from tests.integration.cri.gen import cri_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.integration.containerd import Containerd
    from tests.integration.cri.client import Cri

HANDLER = "kata-py"
# Without a word about devices: CRI offers privileged containers all of the host's.
HOST_DEVICES_HANDLER = "kata-py-host-devices"
# The same, with containerd's Sandbox API: from containerd 2.0 on.
SANDBOX_API_HANDLER = "kata-py-sandbox-api"
# Whether all pods are made by that API, for a run of the whole suite with it.
BY_SANDBOX_API = os.environ.get("KATA_PY_TEST_SANDBOXER") == "shim"
WAIT_TIMEOUT_S = 60.0
POLL_PAUSE_S = 0.05
FOREVER = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done")


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Returns when the condition holds. CRI has no call that waits for a container: a kubelet asks again and again."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(POLL_PAUSE_S)


@dataclass(kw_only=True)
class Pod:
    """A running pod. `logs` is the folder of its containers' logs."""

    id: str
    config: pb.PodSandboxConfig
    cri: Cri
    logs: Path

    def create(
        self,
        name: str,
        command: Sequence[str] = FOREVER,
        *,
        attempt: int = 0,
        linux: pb.LinuxContainerConfig | None = None,
        **fields: Any,
    ) -> str:
        """Makes a container and returns its id. `fields` are those of ContainerConfig; the namespaces are the pod's
        unless `linux` has others."""
        linux = linux or pb.LinuxContainerConfig()
        if not linux.security_context.HasField("namespace_options"):
            linux.security_context.namespace_options.CopyFrom(
                self.config.linux.security_context.namespace_options
            )
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=busybox_image.NAME),
            command=command,
            log_path=f"{name}_{attempt}.log",
            linux=linux,
            **fields,
        )
        return self.cri.create(self.id, config, self.config)

    def run(self, name: str, command: Sequence[str] = FOREVER, **options: Any) -> str:
        """Makes a container, starts it, and returns its id."""
        container = self.create(name, command, **options)
        self.cri.start(container)
        return container

    def exec(self, container: str, *command: str) -> str:
        """Standard output of a command that has to succeed."""
        done = self.cri.exec(container, command)
        assert done.exit_code == 0, f"{command}: status {done.exit_code}: {done.stderr.decode()}"
        return done.stdout.decode()

    def finished(self, container: str) -> pb.ContainerStatus:
        """The container's status once it has ended."""
        eventually(
            lambda: self.cri.container(container).state == pb.CONTAINER_EXITED,
            f"container {container} has ended",
        )
        return self.cri.container(container)

    def output(self, name: str, *, attempt: int = 0, stream: str = "stdout") -> str:
        """What a container has written so far, out of its log."""
        return read_log(self.logs / f"{name}_{attempt}.log", stream)

    def emptied(self) -> Iterator[Pod]:
        """Yields the pod, and removes all its containers after that: for fixtures of tests that share a pod."""
        yield self
        for container in self.cri.containers(self.id):
            self.cri.stop(container.id)
            self.cri.remove(container.id)

    def remove(self) -> None:
        """Stops and removes it, with whatever runs in it."""
        self.cri.stop_pod(self.id)
        self.cri.remove_pod(self.id)


def read_log(path: Path, stream: str) -> str:
    """The text of one stream: lines of a time, the stream's name, P for a part or F for the end of a line, and text."""
    text = []
    for line in path.read_text().splitlines():
        _, name, tag, part = line.split(" ", 3)
        if name == stream:
            text.append(part if tag == "P" else f"{part}\n")
    return "".join(text)


@dataclass(kw_only=True)
class Kubelet:
    """Makes pods on one containerd. `folder` is for logs."""

    containerd: Containerd
    cri: Cri
    folder: Path
    handler: str = HANDLER

    def run_pod(
        self,
        name: str = "pod",
        *,
        handler: str | None = None,
        host_network: bool = False,
        shared_pid: bool = False,
        security: pb.LinuxSandboxSecurityContext | None = None,
        linux: pb.LinuxPodSandboxConfig | None = None,
        **fields: Any,
    ) -> Pod:
        """RunPodSandbox. `fields` are those of PodSandboxConfig, and `linux` what is to be in it beside the
        namespaces and the cgroup."""
        unique = self.containerd.new_id(name)
        security = security or pb.LinuxSandboxSecurityContext()
        security.namespace_options.network = pb.NODE if host_network else pb.POD
        security.namespace_options.pid = pb.POD if shared_pid else pb.CONTAINER
        linux = linux or pb.LinuxPodSandboxConfig()
        linux.security_context.CopyFrom(security)
        linux.cgroup_parent = f"/{self.containerd.cgroup_parent}"
        logs = self.folder / "logs" / unique
        logs.mkdir(parents=True)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=unique, uid=unique, namespace="default"),
            log_directory=str(logs),
            linux=linux,
            **{"hostname": name, **fields},
        )
        pod = Pod(
            id=self.cri.run_pod(config, handler or self.handler), config=config, cri=self.cri, logs=logs
        )
        self.containerd.ids.append(pod.id)
        return pod

    @contextmanager
    def pod(self, name: str = "pod", **options: Any) -> Iterator[Pod]:
        """A pod for the time of the block."""
        pod = self.run_pod(name, **options)
        try:
            yield pod
        finally:
            pod.remove()

"""Ways to bring one container's machine into a state and to let a part of it die."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc

from shim.api.gen.types_pb2 import Mount
from shim.protowire import bytes_field, fields
from tests.integration.containerd import IMAGE
from tests.support.host import descendants

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.containerd import Containerd

T = TypeVar("T")

# Far more than anything here takes; a machine that other tests' guests keep busy may need much of it.
PATIENCE_S = 100.0


def until(look: Callable[[], T]) -> T:
    """What `look` finds as soon as it is true: the kernel tells nobody when a process or a record appears."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"still nothing after {PATIENCE_S} s"
        time.sleep(0.01)
    return found


def parts(container: str) -> dict[str, int]:
    """The pids of QEMU, of virtiofsd, and of the shim that started them, as far as they run."""
    found = {}
    for pid, words in descendants(os.getpid()).items():
        program = words.partition(" ")[0].rpartition("/")[2]
        if container in words and program in ("qemu-system-x86_64", "virtiofsd"):
            found[program.partition("-")[0]] = pid
    if "qemu" in found:
        # A fork of what containerd started, with the same arguments: told by its children alone.
        status = Path(f"/proc/{found['qemu']}/status").read_text()
        found["shim"] = int(status.partition("PPid:")[2].split()[0])
    return found


def with_monitor(config: Path, folder: Path) -> Path:
    """Let QEMU have a second monitor and the guest panic at an unexpected interrupt; returns the monitor's socket."""
    monitor, wrapper = folder / "monitor", folder / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec qemu-system-x86_64 "$@" -qmp unix:{monitor},server=on,wait=off\n')
    wrapper.chmod(0o755)
    keys = f'[hypervisor.qemu]\npath = "{wrapper}"\nkernel_params = "unknown_nmi_panic"'
    config.write_text(config.read_text().replace("[hypervisor.qemu]", keys))
    return monitor


def panic(monitor: Path) -> None:
    """End the guest's kernel, and with it the agent: an interrupt that the hardware reserves for failures."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(monitor))
        with sock.makefile("rw") as stream:
            assert "QMP" in json.loads(stream.readline())
            for command in ("qmp_capabilities", "inject-nmi"):
                stream.write(json.dumps({"execute": command}))
                stream.flush()
                while "return" not in json.loads(stream.readline()):
                    """An event."""


class Events:
    """What containerd tells about one container from now on. A context manager."""

    def __init__(self, containerd: Containerd, container: str) -> None:
        self._container = container
        self._client = containerd.popen("events")

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.kill()
        self._client.communicate()

    def to_the_end(self) -> list[tuple[str, int]]:
        """Topic and exit status (0 where there is none) of all events until the container itself is removed."""
        found: list[tuple[str, int]] = []
        assert self._client.stdout is not None
        while "/containers/delete" not in dict(found):
            line = self._client.stdout.readline().decode()
            assert line, "ctr events ended"
            # Date, time, zone and its name, namespace, topic, the event in JSON.
            topic, event = line.split(maxsplit=6)[-2:]
            body = json.loads(event)
            if self._container in (body.get("container_id"), body.get("id")):
                found.append((topic, body.get("exit_status", 0)))
        return found


class CreatedTask:
    """A task that has been created and not started, which `ctr` cannot do."""

    def __init__(self, containerd: Containerd, container: str) -> None:
        self.container = container
        self._metadata = (("containerd-namespace", containerd.namespace),)
        self._channel = grpc.insecure_channel(f"unix:{containerd.server.socket}")
        containerd.checked(
            "containers", "create", "--snapshotter", containerd.snapshotter, "--runtime", containerd.runtime,
            IMAGE, container, "sleep", "1000",
        )  # fmt: skip
        line = containerd.checked(
            "snapshots", "--snapshotter", containerd.snapshotter, "mounts", "/", container
        )
        # mount -t TYPE SOURCE TARGET -o OPTIONS
        _, _, kind, source, _, _, options = line.split()
        mount = Mount(type=kind, source=source, options=options.split(","))
        self._call("Create", bytes_field(1, container) + bytes_field(3, mount.SerializeToString())).result()
        self._end = self._call("Wait", bytes_field(1, container))

    def ended_badly(self) -> bool:
        """Wait for the task's end; containerd breaks such a wait off when the shim dies."""
        try:
            return dict(fields(self._end.result())).get(1, 0) != 0
        except grpc.RpcError:
            return True

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, request: bytes) -> grpc.Future[bytes]:
        name = f"/containerd.services.tasks.v1.Tasks/{method}"
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(name)
        return call.future(request, timeout=PATIENCE_S, metadata=self._metadata)

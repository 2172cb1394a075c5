"""A private dockerd: its folders, socket, groups and containers are the test's own, and it has no network."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image

from tests.support import host
from tests.support.containers import groups_below

if TYPE_CHECKING:
    from collections.abc import Sequence

BUSYBOX = Path("/bin/busybox")
IMAGE = "test/busybox"
_START_S = 60.0


class Docker:
    """A daemon, and commands for it. `options` are more of the daemon's; it finds shims in `path`."""

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        *,
        path: str = "",
        environment: dict[str, str] | None = None,
        manager: str = "cgroupfs",
    ) -> None:
        # A slice, if it is systemd's, in whose names dashes lead to other slices.
        name = f"kpydocker{secrets.token_hex(4)}"
        parent, self.name = (f"{name}.slice",) * 2 if manager == "systemd" else (f"/{name}", name)
        self._socket = folder / "docker.sock"
        self._log = folder / "dockerd.log"
        self.folder = folder
        self._before = host.descendants(os.getpid())
        (folder / "daemon.json").write_text("{}")
        words = [
            "dockerd", "--config-file", str(folder / "daemon.json"), "--data-root", str(folder / "data"),
            "--exec-root", str(folder / "exec"), "--pidfile", str(folder / "pid"), "--host", f"unix://{self._socket}",
            "--bridge", "none", "--iptables=false", "--ip6tables=false", "--storage-driver", "vfs",
            "--cgroup-parent", parent, "--exec-opt", f"native.cgroupdriver={manager}", *options,
        ]  # fmt: skip
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **(environment or {})},
            )  # fmt: skip

    def wait_until_up(self) -> None:
        """Nothing tells when its socket is there."""
        deadline = time.monotonic() + _START_S
        while True:
            assert self.process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
                connection.connect(str(self._socket))
                return
            time.sleep(0.05)

    def call(self, *words: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["docker", "--host", f"unix://{self._socket}", *words], capture_output=True, check=False, input=data,
            timeout=120,
        )  # fmt: skip

    def ok(self, *words: str, data: bytes | None = None) -> str:
        done = self.call(*words, data=data)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr.decode()}"
        return done.stdout.decode().strip()

    def first_event(self, container: str, event: str) -> str:
        """Of this kind and of this container, which may have come already."""
        words = ["events", "--since", "0", "--filter", f"container={container}", "--filter", f"event={event}"]
        command = ["docker", "--host", f"unix://{self._socket}", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.terminate()
        return line

    def import_image(self) -> None:
        self.ok("import", "-", IMAGE, data=busybox_image.root_layer(BUSYBOX, busybox_image.applets(BUSYBOX)))

    def groups(self) -> list[Path]:
        return groups_below(self.name)

    def stop(self) -> list[str]:
        """Everything it has started ends. Returns what is left all the same."""
        if self.process.poll() is None:
            containers = self.call("ps", "--all", "--quiet").stdout.decode().split()
            if containers:
                self.call("rm", "--force", *containers)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        for path in reversed(self.groups()):
            with suppress(OSError):  # it leaves the parent that it was given
                path.rmdir()
        host.reap()
        running = {
            pid: each for pid, each in host.descendants(os.getpid()).items() if pid not in self._before
        }
        host.kill(running)
        return [*running.values(), *map(str, self.groups()), *host.mounts_below(self.folder)]

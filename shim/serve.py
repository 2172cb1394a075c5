"""The daemon of one sandbox, from its fork to its end: what runs before QEMU is started, and in which order.

Everything that the first steps do not need is imported by `shim.daemon`, while QEMU and the guest's kernel start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shim import cleanup, log, mounts, paths, record
from shim.share import SharedDir

if TYPE_CHECKING:
    from shim.bootstrap import Bootstrap
    from shim.host_cgroup import HostCgroup


def serve(bootstrap: Bootstrap, listener_fd: int, socket_path: str) -> int:
    """Run the daemon on a listening socket until containerd shuts it down; returns the process's exit code."""
    started_at = time.monotonic()
    log.configure(
        log.open_fifo(Path(bootstrap.bundle)),
        debug=bootstrap.debug,
        sandbox=bootstrap.id,
        namespace=bootstrap.namespace,
    )
    for number in (signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_serve(bootstrap, listener_fd, socket_path, started_at))
    return 0


async def _serve(bootstrap: Bootstrap, listener_fd: int, socket_path: str, started_at: float) -> None:
    from shim.boot import Boot

    host = HostState(bootstrap, socket_path)
    boot = Boot(bootstrap, host, started_at)
    # Runs up to the point where QEMU is started, or cannot be; only then come the imports that would delay it.
    await boot.launched()
    from shim.daemon import run

    listener = socket.socket(fileno=listener_fd)
    listener.setblocking(False)
    await run(bootstrap, host, boot, listener)


class HostState:
    """What a sandbox has on the host beside its processes: record, directories, socket."""

    def __init__(self, bootstrap: Bootstrap, socket_path: str) -> None:
        self.sandbox_id = bootstrap.id
        self.run_dir = Path(paths.run_dir(bootstrap.id))
        self.share = SharedDir(bootstrap.id)
        self._socket_path = socket_path
        self._cgroup: HostCgroup | None = None
        pid = os.getpid()
        self._record = record.Record(
            bootstrap.namespace, bootstrap.bundle, socket_path, pid, record.start_time(pid) or 0
        )

    def create(self) -> None:
        """Make the directories; the record comes first, so that whatever follows can be found and undone.

        Raises:
            OSError: not allowed, or the place is taken.
        """
        host_mounts = mounts.enter_private_mount_namespace()
        paths.make_dir(str(self.run_dir))
        self._record.write(self.sandbox_id)
        self.share.create(host_mounts)

    def remember_helpers(self, pids: dict[str, int]) -> None:
        """Add helper programs to the record."""
        for name, pid in pids.items():
            self._record.helpers[name] = (pid, record.start_time(pid) or 0)
        self._record.write(self.sandbox_id)

    def remember_network(self, netns: Path, ifindexes: list[int]) -> None:
        """Add to the record the interfaces of the pod that something of ours is put on."""
        self._record.network = (str(netns), ifindexes)
        self._record.write(self.sandbox_id)

    def own_cgroup(self, pod: str, overhead: str = "") -> HostCgroup:
        """The control groups of the sandbox, in the record before they are made."""
        if self._cgroup is None:
            from shim.host_cgroup import HostCgroup

            self._cgroup = HostCgroup(pod, overhead)
            self._record.cgroup = self._cgroup.folders
            self._record.write(self.sandbox_id)
        return self._cgroup

    def remove(self) -> None:
        """Leave nothing behind. Harmless when repeated."""
        if self._cgroup is not None:
            self._cgroup.leave()
        self.share.remove()
        if self.run_dir.exists():
            cleanup.remove_tree(str(self.run_dir))
        paths.remove_empty_parents()
        Path(self._socket_path).unlink(missing_ok=True)

"""Where measurements happen: a folder, a private containerd, and the promise that nothing of it stays.

The bench adopts orphans (PR_SET_CHILD_SUBREAPER): whatever it causes, however indirectly, is its descendant for as
long as it lives, and is ended with it. Nothing is recognised by its name.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import dev_config
import sandboxes
from private_containerd import PrivateContainerd

from bench import ROOT
from bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

GUEST = ROOT / "build" / "guest"
IMAGE_ARCHIVE = ROOT / "build" / "busybox.tar"
IMAGE = busybox_image.NAME
SHIM = ROOT / "build" / "bin" / "containerd-shim-kata-py-v2"
KATA_PY, RUNC = "io.containerd.kata-py.v2", "io.containerd.runc.v2"
NAMESPACE = "kata-py-bench"
LIMIT_S = 300.0
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@dataclass(frozen=True)
class Lab:
    """A folder of our own, a configuration like that of `make run`, and a running containerd."""

    folder: Path
    config: Path
    server: PrivateContainerd
    snapshotter: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_id(self) -> str:
        """An id for a container or an exec."""
        return f"bench{next(self._numbers)}-{os.getpid()}"

    def run_argv(
        self, runtime: str, container: str, *command: str, options: Sequence[str] = ("--rm",)
    ) -> list[str]:
        """The command line of a `ctr run`."""
        fixed = [*self.server.fifo_options(), "--snapshotter", self.snapshotter, "--runtime", runtime]
        return self.server.ctr_argv("run", *fixed, *options, IMAGE, container, *command, namespace=NAMESPACE)

    def exec_argv(self, container: str, *command: str) -> list[str]:
        """The command line of a `ctr tasks exec`."""
        fixed = [*self.server.fifo_options(), "--exec-id", self.new_id()]
        return self.server.ctr_argv("tasks", "exec", *fixed, container, *command, namespace=NAMESPACE)

    @contextmanager
    def idle_container(self, runtime: str, options: Sequence[str] = ()) -> Iterator[str]:
        """A container that sleeps for the length of the block; its id."""
        container = self.new_id()
        checked(self.run_argv(runtime, container, "sleep", "86400", options=["--detach", *options]))
        try:
            yield container
        finally:
            self.server.ctr("tasks", "rm", "--force", container, namespace=NAMESPACE, timeout_s=LIMIT_S)
            self.server.ctr("containers", "rm", container, namespace=NAMESPACE)


@contextmanager
def lab() -> Iterator[Lab]:
    """Everything that measurements need, and at the end the host as it was.

    Raises BenchError when something is missing, ContainerdError when containerd does not start.
    """
    if os.geteuid() != 0:
        raise BenchError("containerd, and QEMU with shared directories, need root")
    for path in (GUEST / "manifest.json", IMAGE_ARCHIVE, SHIM):
        if not path.exists():
            raise BenchError(f"{path.relative_to(ROOT)} is missing: `make bench` builds it")
    with ExitStack() as undo:
        undo.enter_context(_orphans_adopted())
        # Short on purpose: Unix sockets below it must fit into 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="kpb-"))
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        guest = shutil.copytree(GUEST, folder / "guest")  # so that building anew meanwhile changes nothing
        config = folder / "configuration.toml"
        config.write_text(dev_config.render(guest, writer="make bench"))
        server = PrivateContainerd(
            folder=folder / "c", search_path=(SHIM.parent,), environment={"KATA_CONF_FILE": str(config)}
        )
        undo.callback(_remove, server)
        server.start()
        snapshotter = server.snapshotter()
        server.import_image(IMAGE_ARCHIVE, snapshotter=snapshotter, namespace=NAMESPACE)
        yield Lab(folder, config, server, snapshotter)


def _remove(server: PrivateContainerd) -> None:
    # A second interrupt must not keep the rest from being removed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.stop()
    end_descendants()
    sandboxes.clean_up(server, SHIM)
    server.remove()
    for folder, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
        # The containers' own groups are gone; `ctr` puts them below one for the namespace, which nobody owns.
        if Path(folder).name == NAMESPACE:
            with suppress(OSError):
                os.rmdir(folder)


def checked(argv: Sequence[str | Path], *, limit_s: float = LIMIT_S) -> str:
    """Runs a program that has to succeed; its standard output. Raises BenchError."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise BenchError(f"{' '.join(map(str, argv))}: no end after {limit_s:.0f} s") from err
    if done.returncode != 0:
        why = done.stderr.strip() or f"status {done.returncode}"
        raise BenchError(f"{' '.join(map(str, argv))}: {why}")
    return done.stdout


def timed(argv: Sequence[str | Path]) -> float:
    """Seconds that a program takes which has to succeed. Raises BenchError."""
    started = time.monotonic()
    checked(argv)
    return time.monotonic() - started


@contextmanager
def _orphans_adopted() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        end_descendants()
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def end_descendants(*, keep: Collection[int] = ()) -> None:
    """Kills what we have started, directly or not, and still runs; but not the children `keep` and theirs."""
    # Who loses its parent becomes our child, so this comes to an end only when all are gone.
    while found := set(children(os.getpid())).difference(keep):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def reap() -> None:
    """Takes note of adopted processes that have ended, so that they do not stay as zombies."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def children(pid: int) -> list[int]:
    """Children of all threads of a process, ended ones that nobody has waited for included."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return [int(child) for child in found]

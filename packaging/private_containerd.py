"""A containerd of our own beside whatever the host runs: its root, state, sockets and log lie in one folder.

Used by `make run` (where it keeps running until `make stop`) and by the integration tests (where it ends
with the session). It never talks to, configures or stops a containerd that somebody else started: the
process is known by its process id and start time, and the shims that belong to it by the socket path in
their arguments.

Only two things of containerd cannot be moved, and both are per container: shim sockets, which containerd 1.6
to 2.x derive under /run/containerd/s, and the state that the runtime itself keeps.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM
from socket import socket as Socket
from typing import TYPE_CHECKING

import cri_config

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# sun_path of a Unix socket holds 108 bytes with its final zero (unix(7)); containerd appends ".ttrpc" to the
# address.
SOCKET_PATH_LIMIT = 107 - len(".ttrpc")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
# What the images and tasks of `ctr` need stays on. The rest either wants the host's folders (opt, nri), or
# devices and file systems that it would only complain about. Names that a version does not know are ignored.
DISABLED_PLUGINS = (
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs",
)
_BLOCKFILE = "io.containerd.snapshotter.v1.blockfile"
_DEVMAPPER = "io.containerd.snapshotter.v1.devmapper"


class ContainerdError(Exception):
    """The private containerd did not do what was asked; the text ends with the log's last lines."""


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None when there is no such process.

    With the process id it names a process for good: ids are reused, start times are not (proc(5), field 22).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may contain anything, parentheses included.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def wait_for_exit(pid: int, timeout_s: float) -> bool:
    """Waits until a process, not necessarily a child, is gone; False when it still runs after the time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(handle)


def end_process(pid: int, timeout_s: float) -> None:
    """SIGTERM, and SIGKILL if that did not help in time."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if not wait_for_exit(pid, timeout_s):
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid, timeout_s)
    # Ours when this process started it; somebody else's child (init's, after `make run` ended) otherwise.
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def choose_folder(wanted: Path, fallback: Path) -> Path:
    """`wanted`, or the shorter `fallback` when a socket's path below `wanted` would be too long."""
    too_long = len(os.fsencode(wanted / "s" / "containerd.sock")) > SOCKET_PATH_LIMIT
    return fallback if too_long else wanted


@dataclass(frozen=True, kw_only=True)
class PrivateContainerd:
    """One private containerd, running or not; its state is in `folder`, so a later process can go on with it.

    `programs` is the folder with the containerd and ctr to use (default: the ones in PATH), `search_path`
    are folders put before PATH, where containerd finds shims, and `environment` is added to what its shims
    inherit. With `cri` it speaks Kubernetes' interface on its socket as well. `scratch` is an image with an empty file
    system: the snapshotter `blockfile`, of containerd 1.7 and later, copies it for each snapshot. With `erofs` layers
    are unpacked as the snapshotter of that name wants them, of 2.1 and later, where there is the program for it.
    `thin_pool` is the name of a pool of the device mapper, in which the snapshotter `devmapper` then has its snapshots.
    """

    folder: Path
    programs: Path | None = None
    search_path: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log_level: str = "info"
    cri: cri_config.CriConfig | None = None
    scratch: Path | None = None
    erofs: bool = False
    thin_pool: str = ""

    @property
    def socket(self) -> Path:
        """Where its clients connect."""
        return self.folder / "s" / "containerd.sock"

    @property
    def log(self) -> Path:
        """What containerd wrote to stderr, and with it what the shims logged."""
        return self.folder / "containerd.log"

    @property
    def _record(self) -> Path:
        return self.folder / "containerd.pid"

    def program(self, name: str) -> str:
        """Path of `containerd` or `ctr`; raises ContainerdError when it is not installed."""
        found = shutil.which(name, path=str(self.programs) if self.programs else None)
        if found is None:
            place = self.programs or "PATH"
            raise ContainerdError(f"{name} is not in {place}; packaging/setup.sh installs it")
        return found

    def pid(self) -> int | None:
        """Process id while it runs. A recycled id is not mistaken for it."""
        try:
            pid, ticks = map(int, self._record.read_text().split())
        except (FileNotFoundError, ValueError):  # not started, or its starter was killed while writing
            return None
        return pid if start_ticks(pid) == ticks else None

    def start(self) -> bool:
        """Starts it unless it runs already; returns whether that was needed.

        It answers calls when this returns. Raises ContainerdError with the end of the log otherwise.
        """
        if self.pid() is not None:
            return False
        self._record.unlink(missing_ok=True)
        (self.folder / "s").mkdir(parents=True, exist_ok=True)
        config = self.folder / "containerd.toml"
        config.write_text(self._config())
        with closing(Socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)) as notify:
            # An abstract name: nothing to remove afterwards (unix(7)).
            notify.bind(b"\0kata-py-containerd-" + os.urandom(8).hex().encode())
            name = "@" + notify.getsockname()[1:].decode()
            pid = self._spawn(config, notify_socket=name)
            self._record.write_text(f"{pid} {start_ticks(pid)}\n")
            try:
                self._wait_until_ready(pid, notify)
            except BaseException:
                end_process(pid, STOP_TIMEOUT_S)
                self._record.unlink(missing_ok=True)
                raise
        return True

    def _spawn(self, config: Path, *, notify_socket: str) -> int:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment = {
            **inherited,
            **self.environment,
            "PATH": self._path(),
            "NOTIFY_SOCKET": notify_socket,
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [self.program("containerd"), "--config", config, "--log-level", self.log_level],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Newer versions look for shims in their own working folder before PATH.
                cwd=self.folder / "s",
                env=environment,
                start_new_session=True,
            )
        # It may outlive us, so that nobody waits for it here; Popen would warn about that when collected.
        process.returncode = 0
        return process.pid

    def _path(self) -> str:
        folders = [str(folder) for folder in (*self.search_path, self.programs) if folder]
        return os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])

    def _wait_until_ready(self, pid: int, notify: Socket) -> None:
        """Returns on containerd's own READY=1 (sd_notify(3))."""
        deadline = time.monotonic() + START_TIMEOUT_S
        handle = os.pidfd_open(pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                readable, _, _ = select.select([notify.fileno(), handle], [], [], left)
                if notify.fileno() in readable and b"READY=1" in notify.recv(4096).split(b"\n"):
                    return
                if handle in readable:
                    # Only looked at: as a zombie its id stays taken until `end_process` has reaped it.
                    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                    status = end.si_status if end else "unknown"
                    raise self.error(f"containerd ended with status {status} while starting")
        finally:
            os.close(handle)
        raise self.error(f"containerd did not become ready within {START_TIMEOUT_S:.0f} s")

    def log_size(self) -> int:
        """Where the log ends now, for `log_since`."""
        return self.log.stat().st_size

    def log_since(self, offset: int) -> str:
        """What containerd and the shims have logged since then."""
        with self.log.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def error(self, problem: str, *, since: int = 0) -> ContainerdError:
        """An error that ends with the last lines of the log, from `since` on, and its place."""
        tail = self.log_since(since).splitlines()[-10:] if self.log.exists() else []
        return ContainerdError(
            "\n".join([problem, *(f"    {line}" for line in tail), f"    (log: {self.log})"])
        )

    def _config(self) -> str:
        # Version 2 is read by 1.6 and 1.7 as it is, and migrated in memory by 2.x, whose own is 3. A JSON string
        # or list of strings is also a TOML one.
        version = 3 if self.cri is not None and self.generation() >= 2 else 2
        disabled = (*DISABLED_PLUGINS, *(() if self.cri else cri_config.PLUGINS))
        if self.scratch is None:
            disabled = (*disabled, _BLOCKFILE)
        if not self.thin_pool:
            disabled = (*disabled, _DEVMAPPER)
        return "\n".join(
            [
                f"version = {version}",
                f"root = {json.dumps(str(self.folder / 'root'))}",
                f"state = {json.dumps(str(self.folder / 'state'))}",
                f"disabled_plugins = {json.dumps(disabled)}",
                "[grpc]",
                f"  address = {json.dumps(str(self.socket))}",
                self.cri.render(version) if self.cri else "",
                *self._blockfile(),
                *self._erofs(),
                *self._devmapper(),
                "",
            ]
        )

    def _blockfile(self) -> list[str]:
        if self.scratch is None:
            return []
        return [
            f'[plugins."{_BLOCKFILE}"]',
            f"  scratch_file = {json.dumps(str(self.scratch))}",
            '  fs_type = "ext4"',
        ]

    def _erofs(self) -> list[str]:
        """For the snapshotter of this name, layers are unpacked into images of that file system."""
        if not self.erofs or self.version() < (2, 1) or not self.makes_erofs():
            return []
        return ['[plugins."io.containerd.service.v1.diff-service"]', '  default = ["erofs", "walking"]']

    def makes_erofs(self) -> bool:
        """Whether there is the program that makes images with erofs."""
        return shutil.which("mkfs.erofs", path=self._path()) is not None

    def _devmapper(self) -> list[str]:
        if not self.thin_pool:
            return []
        return [
            f'[plugins."{_DEVMAPPER}"]',
            f"  root_path = {json.dumps(str(self.folder / 'devmapper'))}",
            f"  pool_name = {json.dumps(self.thin_pool)}",
            '  base_image_size = "64MB"',
        ]

    def generation(self) -> int:
        """The first number of containerd's version. Raises ContainerdError when it does not tell."""
        return self.version()[0]

    def version(self) -> tuple[int, int]:
        """The first two numbers of containerd's version. Raises ContainerdError when it does not tell."""
        argv = [self.program("containerd"), "--version"]
        answer = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
        # "containerd github.com/containerd/containerd[/v2] 1.6.20~ds1 1.6.20~ds1-1+deb12u3"
        words = answer.split()
        numbers = words[2].lstrip("v").split(".")[:2] if len(words) > 2 else []
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise ContainerdError(f"cannot tell the version of {argv[0]} from {answer!r}")
        return int(numbers[0]), int(numbers[1])

    def ctr_argv(self, *arguments: str, namespace: str = "default") -> list[str]:
        """The command line of a `ctr` call to this containerd, ready for subprocess or for pasting."""
        return [self.program("ctr"), "--address", str(self.socket), "--namespace", namespace, *arguments]

    def fifo_options(self) -> list[str]:
        """What `ctr run` and `ctr task exec` need so that their FIFOs stay inside the folder."""
        return ["--fifo-dir", str(self.folder / "fifo")]

    def ctr(
        self, *arguments: str, namespace: str = "default", input: str | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs `ctr` to its end and returns what it answered; TimeoutExpired if it does not end in time."""
        return subprocess.run(
            self.ctr_argv(*arguments, namespace=namespace),
            input=input,
            # Otherwise ctr would read this process's own stdin.
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def checked_ctr(self, *arguments: str, namespace: str = "default", timeout_s: float = 60.0) -> str:
        """Standard output of a `ctr` call that has to succeed; raises ContainerdError with its complaint."""
        done = self.ctr(*arguments, namespace=namespace, timeout_s=timeout_s)
        if done.returncode != 0:
            raise self.error(
                f"ctr {' '.join(arguments)}: {done.stderr.strip() or f'status {done.returncode}'}"
            )
        return done.stdout

    def snapshotter(self) -> str:
        """`overlayfs` where the folder's file system carries it, by containerd's own probe, else `native`."""
        return "overlayfs" if self.snapshotter_status("overlayfs") == "ok" else "native"

    def snapshotter_status(self, name: str) -> str | None:
        """containerd's word for a snapshotter, "ok" when it works; None when this containerd has none of that name."""
        for line in self.checked_ctr("plugins", "ls").splitlines():
            words = line.split()
            if words[:2] == ["io.containerd.snapshotter.v1", name]:
                return words[-1]
        return None

    def import_image(self, archive: Path, *, snapshotter: str, namespace: str = "default") -> None:
        """Loads an OCI archive and unpacks it for `ctr run`."""
        self.checked_ctr("images", "import", "--snapshotter", snapshotter, str(archive), namespace=namespace)

    def end_tasks(self, *, keep: Collection[str] = (), timeout_s: float = 20.0) -> None:
        """Kills and deletes what still runs here, so that nothing outlives containerd; not the ids to `keep`."""
        for namespace in self.checked_ctr("namespaces", "ls", "--quiet").split():
            tasks = self.checked_ctr("tasks", "ls", "--quiet", namespace=namespace).split()
            for task in (name for name in tasks if name not in keep):
                # ctr stops waiting only when the runtime answers; a shim that does not is ended with
                # `end_shims`.
                with suppress(subprocess.TimeoutExpired):
                    self.ctr("tasks", "rm", "--force", task, namespace=namespace, timeout_s=timeout_s)
            containers = self.checked_ctr("containers", "ls", "--quiet", namespace=namespace).split()
            for container in (name for name in containers if name not in keep):
                with suppress(subprocess.TimeoutExpired):
                    self.ctr("containers", "rm", container, namespace=namespace, timeout_s=timeout_s)

    def shims(self) -> list[int]:
        """Process ids of the shims that this containerd started: their arguments name its socket."""
        mine = os.fsencode(self.socket)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    arguments = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"-address" in arguments and mine in arguments and b"-namespace" in arguments:
                        found.append(int(entry.name))
        return sorted(found)

    def end_shims(self, timeout_s: float = 5.0) -> list[int]:
        """Ends shims that outlived their tasks; returns their process ids."""
        left = self.shims()
        for pid in left:
            end_process(pid, timeout_s)
        return left

    def stop(self) -> bool:
        """Ends its tasks, then containerd, then shims that are left; returns whether it was running."""
        pid = self.pid()
        if pid is not None:
            with suppress(ContainerdError):
                self.end_tasks()
            end_process(pid, STOP_TIMEOUT_S)
        self.end_shims()
        self._record.unlink(missing_ok=True)
        return pid is not None

    def mounts(self) -> list[Path]:
        """Mount points below the folder, deepest first."""
        points = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            # Field 5 of proc(5)'s mountinfo; white space and backslashes in it are octal escapes.
            point = Path(
                os.fsdecode(line.split()[4].encode("latin-1").decode("unicode_escape").encode("latin-1"))
            )
            if point.is_relative_to(self.folder):
                points.append(point)
        return sorted(points, key=lambda point: len(point.parts), reverse=True)

    def remove(self) -> None:
        """Stops it and removes the folder. Mounts go first: a recursive removal would reach through them."""
        self.stop()
        for point in self.mounts():
            subprocess.run(["umount", "--lazy", point], check=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

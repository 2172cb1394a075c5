"""A real containerd for the tests, and the state of the host before and after each of them.

containerd is a child of the test session, and the session adopts orphans (PR_SET_CHILD_SUBREAPER). So every
process that a test causes, however indirectly, is a descendant of the session for as long as it lives:
nothing has to be recognised by its name, and nothing that somebody else runs on the host is mistaken for a
leftover.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import dev_config
import pytest
import sandboxes
from private_containerd import PrivateContainerd

from tests.support.host import descendants

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GUEST = REPOSITORY / "build" / "guest"
IMAGE_ARCHIVE = REPOSITORY / "build" / "busybox.tar"
IMAGE = busybox_image.NAME
SHIM = REPOSITORY / "build" / "bin" / "containerd-shim-kata-py-v2"
RUNTIME = "io.containerd.kata-py.v2"
# How long a shim and what belongs to it may need to be gone after containerd considers the task deleted.
SETTLE_S = 10.0
CGROUPS = Path("/sys/fs/cgroup")
# What is in the first ones is named after a sandbox, so that the things of other sandboxes on the host can be told
# apart; what is in the others is not.
SANDBOX_FOLDERS = ("/run/kata-py", "/run/kata-containers/shared/sandboxes")
SOCKET_FOLDER = "/run/containerd/s"
COMMON_FOLDERS = ("/run/netns", "/dev/shm", "/sys/class/net")


@dataclass
class Containerd:
    """What a test needs of the private containerd. All tests share one instance and one namespace.

    `snapshotter` is the one the image is unpacked for; `config` is the configuration that shims read. `cgroup_parent`
    is what tells the containers' control groups from those of others: the namespace, unless CRI is told another word.
    """

    server: PrivateContainerd
    namespace: str
    snapshotter: str
    config: Path
    runtime: str = RUNTIME
    ids: list[str] = field(default_factory=list)
    cgroup_parent: str = ""
    image: str = IMAGE
    platform: str = ""
    """Of the image, as containerd names it; empty is the host's."""
    run_options: tuple[str, ...] = ()
    """Of every `ctr run`."""

    def __post_init__(self) -> None:
        self.cgroup_parent = self.cgroup_parent or self.namespace

    def new_id(self, word: str = "c") -> str:
        """A container id that nobody else on the host has, and that the host's state is searched for."""
        self.ids.append(f"{word}{len(self.ids)}-{self.namespace}")
        return self.ids[-1]

    def ctr(
        self, *args: str, input: str | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs `ctr` in the namespace of the tests and returns whatever it answered, but for its own advice."""
        done = self.server.ctr(*args, namespace=self.namespace, input=input, timeout_s=timeout_s)
        # containerd 2.2 and later, on a host with cgroup v1, before anything that the container writes.
        done.stderr = re.sub(r'time="[^"]*" level=warning msg="DEPRECATION: [^"]*"\n', "", done.stderr)
        return done

    def checked(self, *args: str, timeout_s: float = 60.0) -> str:
        """Standard output of a `ctr` call that has to succeed."""
        return self.server.checked_ctr(*args, namespace=self.namespace, timeout_s=timeout_s)

    def popen(self, *args: str) -> subprocess.Popen[bytes]:
        """Starts `ctr` with pipes on all three streams, for tests that write and read bit by bit."""
        return subprocess.Popen(
            self.server.ctr_argv(*args, namespace=self.namespace),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run_arguments(
        self, container: str, command: Sequence[str], *, options: Sequence[str] = (), image: str = ""
    ) -> list[str]:
        """Arguments of a `ctr run` with our runtime, the right snapshotter, and FIFOs where we own them."""
        fixed = [*self.server.fifo_options(), "--snapshotter", self.snapshotter, "--runtime", self.runtime]
        fixed += self.run_options
        if self.platform:
            fixed += ["--platform", self.platform]
        return ["run", *fixed, *options, image or self.image, container, *command]

    def run(
        self,
        *command: str,
        container: str | None = None,
        options: Sequence[str] = ("--rm",),
        input: str | None = None,
        timeout_s: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """`ctr run`: by default a container that is removed when its command has ended.

        Not every version of `ctr run` passes the end of `input` on (1.6 does not): the command should stop
        reading by itself. `exec` does pass it on.
        """
        arguments = self.run_arguments(container or self.new_id(), command, options=options)
        return self.ctr(*arguments, input=input, timeout_s=timeout_s)

    def start(self, *command: str, options: Sequence[str] = (), timeout_s: float = 120.0) -> str:
        """Starts a container in the background and returns its id; `remove` ends it."""
        container = self.new_id()
        self.checked(
            *self.run_arguments(container, command, options=["--detach", *options]), timeout_s=timeout_s
        )
        return container

    def exec(
        self,
        container: str,
        *command: str,
        options: Sequence[str] = (),
        input: str | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """`ctr task exec` in a running container, with an exec id of its own."""
        fixed = [*self.server.fifo_options(), "--exec-id", self.new_id("e")]
        return self.ctr(
            "tasks", "exec", *fixed, *options, container, *command, input=input, timeout_s=timeout_s
        )

    def remove(self, container: str, *, timeout_s: float = 60.0) -> None:
        """Kills and deletes a container's task, if any, and the container."""
        self.ctr("tasks", "rm", "--force", container, timeout_s=timeout_s)
        self.checked("containers", "rm", container, timeout_s=timeout_s)

    def end_all(self, *, keep: Collection[str]) -> None:
        """Ends every task and container but those with the ids to `keep`, after a test that could not do it itself."""
        self.server.end_tasks(keep=keep)

    def objects(self) -> frozenset[str]:
        """Tasks and containers that containerd knows in the namespace of the tests."""
        tasks = self.checked("tasks", "ls", "--quiet").split()
        containers = self.checked("containers", "ls", "--quiet").split()
        return frozenset([f"task {name}" for name in tasks] + [f"container {name}" for name in containers])


@contextmanager
def running(namespace: str, *, thin_pool: str = "") -> Iterator[Containerd]:
    """A private containerd with the image imported; it and all it started end with the block. With a `thin_pool` of the
    device mapper all its snapshots are there."""
    if os.geteuid() != 0:
        pytest.skip("containerd and QEMU with shared directories need root")
    for path, target in ((GUEST / "manifest.json", "guest"), (IMAGE_ARCHIVE, "image")):
        if not path.exists():
            pytest.fail(f"{path.relative_to(REPOSITORY)} is missing: run `make {target} launchers`")
    programs = os.environ.get("KATA_PY_TEST_CONTAINERD_DIR")
    # Short on purpose: Unix sockets below it must fit into 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="kp-", dir="/tmp"))
    config = folder / "configuration.toml"
    config.write_text(dev_config.render(GUEST, writer="tests/integration"))
    scratch = folder / "scratch.img"
    make_ext4(scratch)
    server = PrivateContainerd(
        folder=folder,
        programs=Path(programs).resolve() if programs else None,
        search_path=(REPOSITORY / "build" / "bin",),
        environment={"KATA_CONF_FILE": str(config)},
        log_level=os.environ.get("KATA_PY_TEST_LOG_LEVEL", "info"),
        scratch=scratch,
        erofs=True,
        thin_pool=thin_pool,
    )
    try:
        server.start()
        snapshotter = "devmapper" if thin_pool else server.snapshotter()
        server.import_image(IMAGE_ARCHIVE, snapshotter=snapshotter, namespace=namespace)
        yield Containerd(server=server, namespace=namespace, snapshotter=snapshotter, config=config)
    finally:
        server.remove()


def make_ext4(image: Path, tree: Path | None = None, *, size: str = "16M") -> None:
    """An image with an ext4 file system, with the files of a folder in it."""
    content = ["-d", str(tree)] if tree is not None else []
    program = shutil.which("mkfs.ext4", path=f"/usr/sbin:/sbin:{os.environ['PATH']}")
    assert program is not None, "mkfs.ext4 is missing; packaging/setup.sh installs it"
    argv = [program, "-q", "-F", *content, str(image), size]
    subprocess.run(argv, check=True, timeout=60, capture_output=True)


def loops(containerd: Containerd) -> frozenset[str]:
    """Loop devices on images below containerd's folder."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it has gone meanwhile
            image = path.read_text().strip()
            if image.startswith(str(containerd.server.folder)):
                found.add(f"{path.parent.parent.name} on {image}")
    return frozenset(found)


def mounts(containerd: Containerd) -> frozenset[str]:
    """Mount points below containerd's folder and those of its sandboxes, with their file system types."""
    ours = (
        str(containerd.server.folder),
        *(f"{folder}/{name}" for folder in SANDBOX_FOLDERS for name in containerd.ids),
    )
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if point.startswith(ours):
            found.add(f"{point} ({right.split()[0]})")
    return frozenset(found)


def cgroups(containerd: Containerd) -> frozenset[str]:
    """Control groups, in all hierarchies, of the containers: others come and go."""
    word, ids = containerd.cgroup_parent, containerd.ids
    return frozenset(
        folder
        for folder, _, _ in os.walk(CGROUPS)
        # The last part alone: `ctr` puts containers into /<namespace>/<container>, and the first of these
        # folders belongs to all containers of the namespace.
        if (word in folder and Path(folder).name != word) or any(id_ in folder for id_ in ids)
    )


def make_pods_cgroup(name: str) -> None:
    """Makes the control group for pods in every hierarchy, as a kubelet does before it asks CRI for a pod."""
    unified = (CGROUPS / "cgroup.controllers").exists()
    for hierarchy in [CGROUPS] if unified else CGROUPS.iterdir():
        (hierarchy / name).mkdir(exist_ok=True)


def remove_namespace_cgroups(namespace: str) -> None:
    """Removes the empty parents of the containers' control groups, which no single container owns."""
    for folder, _, _ in os.walk(CGROUPS, topdown=False):
        if Path(folder).name == namespace:
            Path(folder).rmdir()


def entries(folder: str) -> frozenset[str]:
    """Names in a folder; none when it does not exist."""
    try:
        return frozenset(os.listdir(folder))
    except FileNotFoundError:
        return frozenset()


def sandbox_entries(containerd: Containerd) -> frozenset[str]:
    """Folders and sockets on the host that belong to sandboxes of this containerd, as full paths."""
    ids = {*containerd.ids, *sandboxes.left(containerd.server)}
    found = {f"{folder}/{name}" for folder in SANDBOX_FOLDERS for name in entries(folder) & ids}
    sockets = entries(SOCKET_FOLDER)
    for name in ids:
        # containerd's rule for the name of a shim's socket.
        key = f"{containerd.server.socket}/{containerd.namespace}/{name}"
        socket = hashlib.sha256(key.encode()).hexdigest()
        if socket in sockets:
            found.add(f"{SOCKET_FOLDER}/{socket} of {name}")
    return frozenset(found)


def named_entries(word: str) -> frozenset[str]:
    """Full paths of all that has the word in its name, wherever in /run and /dev/shm; what is in a folder of that
    name is not listed again, and root file systems are not searched."""
    found = set()
    for top in ("/run", "/dev/shm"):
        for folder, folders, files in os.walk(top):
            # A folder of just that name is everybody's, see `cgroups`.
            named = {name for name in (*folders, *files) if word in name and name != word}
            found |= {f"{folder}/{name}" for name in named}
            folders[:] = [name for name in folders if name not in named and name != "rootfs"]
    return frozenset(found)


def common_entries() -> frozenset[str]:
    """Full paths of what is in the folders that all programs share."""
    return frozenset(f"{folder}/{name}" for folder in COMMON_FOLDERS for name in entries(folder))


@dataclass(frozen=True, kw_only=True)
class HostState:
    """Everything on the host that running a container may leave behind, each thing as one readable line."""

    processes: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    entries: frozenset[str]
    loops: frozenset[str]
    objects: frozenset[str]

    @classmethod
    def take(cls, containerd: Containerd) -> HostState:
        """The state now."""
        running = caused_by(containerd)
        return cls(
            processes=frozenset(f"{pid} {name}" for pid, name in running.items()),
            mounts=mounts(containerd),
            cgroups=cgroups(containerd),
            entries=sandbox_entries(containerd) | named_entries(containerd.namespace) | common_entries(),
            loops=loops(containerd),
            objects=containerd.objects(),
        )

    def difference(self, later: HostState) -> list[str]:
        """What only `later` has (+) and what only this has (-); processes that ended are left out."""
        lines = []
        for kind in (entry.name for entry in fields(self)):
            before, after = getattr(self, kind), getattr(later, kind)
            lines += [f"+ {kind}: {line}" for line in sorted(after - before)]
            if kind != "processes":
                lines += [f"- {kind}: {line}" for line in sorted(before - after)]
        return lines


def wait_for_end(pids: Sequence[int], timeout_s: float) -> None:
    """Returns when all these processes have ended or the time is over."""
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(handle, select.POLLIN)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                os.close(handle)


def caused_by(containerd: Containerd) -> dict[int, str]:
    """Living processes below this session, without containerd itself, which a test may restart."""
    running = descendants(os.getpid())
    running.pop(containerd.server.pid() or 0, None)
    return running


def leftovers(before: HostState, containerd: Containerd, *, settle_s: float = SETTLE_S) -> list[str]:
    """How the host differs from `before`, after new processes had a moment to end. Empty is good.

    What containerd starts for itself, now and then and for a moment, is new at every look, but not there at each.
    """
    known = {int(line.split()[0]) for line in before.processes}
    deadline = time.monotonic() + settle_s
    while True:
        new = [pid for pid in caused_by(containerd) if pid not in known]
        wait_for_end(new, max(0.0, deadline - time.monotonic()))
        later = HostState.take(containerd)
        if later.processes <= before.processes or time.monotonic() >= deadline:
            return before.difference(later)


def clean_up(before: HostState, containerd: Containerd) -> None:
    """Ends what a failed test left, so that it fails alone."""
    with suppress(Exception):
        containerd.end_all(keep=[line.split()[1] for line in before.objects])
    known = {int(line.split()[0]) for line in before.processes}
    for pid in caused_by(containerd):
        if pid not in known:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    sandboxes.clean_up(containerd.server, SHIM, keep=[Path(line).name for line in before.entries])


def keep_results(folder: Path, containerd: Containerd, offset: int, notes: Sequence[str]) -> None:
    """Saves what explains a failed test: the log since `offset`, notes, small files of the sandboxes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "containerd.log").write_text(containerd.server.log_since(offset))
    (folder / "left-on-host.txt").write_text("\n".join(notes) + "\n")
    state = Path("/run/kata-py")
    for path in state.glob("*/*"):
        # Consoles, records and the like. Never through sockets, FIFOs, or into the shared directories.
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
            target = folder / path.relative_to(state)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

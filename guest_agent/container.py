"""One container: its bundle, its cgroup, its processes. Verbs of one container run one after the other."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from guest_agent.cgroup import ROOT, Cgroup
from guest_agent.errors import AlreadyExists, NotFound, StateConflict
from guest_agent.jsontext import dumps
from guest_agent.mount import is_mount_point, mount, unmount
from guest_agent.process import Process, heeds
from guest_agent.watch import until

if TYPE_CHECKING:
    from guest_agent.engine import Engine
    from guest_agent.oci import Json
    from guest_agent.watch import FileWatch

BUNDLES = "/run/kata-containers"
#: Ended exec processes that are kept for late questions; the oldest are dropped.
MAX_ENDED_EXECS = 64
#: The same of those whose exit code or output the host is still to get. It may never come for them.
MAX_OWED_EXECS = 512

_TERMINATION_PATH_ANNOTATION = "io.kubernetes.container.terminationMessagePath"

#: Who of a pod a container is: containerd's CRI plugin, CRI-O, Kata.
_TYPE_ANNOTATIONS = (
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
    "io.katacontainers.pkg.oci.container_type",
)
_MEMBER = ("container", "pod_container")

CREATED, RUNNING, PAUSED, STOPPED = "created", "running", "paused", "stopped"


class Container:
    """From `create` to `remove`. The state follows from what happened and from whether the init still runs."""

    def __init__(
        self,
        container_id: str,
        config: Json,
        engine: Engine,
        watch: FileWatch,
        *,
        pipe_size: int,
        bundles: str = BUNDLES,
        cgroup_root: str = ROOT,
    ) -> None:
        self.id = container_id
        self.bundle = f"{bundles}/{container_id}"
        self.cgroup = Cgroup(container_id, cgroup_root)
        self.lock = asyncio.Lock()
        self._config = config
        self._engine = engine
        self._watch = watch
        self._pipe_size = pipe_size
        self._started = False
        self._paused = False
        self._oom_kills = 0
        self._init: Process | None = None
        self._execs: dict[str, Process] = {}

    @property
    def init(self) -> Process:
        """Raises NotFound before the engine made it."""
        if self._init is None:
            raise NotFound(f"container {self.id} has no process")
        return self._init

    @property
    def state(self) -> str:
        if self._init is None or not self._init.running:
            return STOPPED
        if self._paused:
            return PAUSED
        return RUNNING if self._started else CREATED

    @property
    def may_hold_pod(self) -> bool:
        """Whether it can be the sandbox container: it is said to be, or at least not said to be another of the pod."""
        annotations = self._config.get("annotations") or {}
        assert isinstance(annotations, dict)
        return not any(annotations.get(name) in _MEMBER for name in _TYPE_ANNOTATIONS)

    @property
    def pid_namespace(self) -> str:
        """Path of the init's pid namespace, for containers that share it."""
        return f"/proc/{self.init.pid}/ns/pid"

    @property
    def termination_log(self) -> str | None:
        """Path, in the guest, of the file that Kubernetes has the container explain its end in."""
        annotations = self._config.get("annotations") or {}
        mounts = self._config.get("mounts") or []
        assert isinstance(annotations, dict)
        assert isinstance(mounts, list)
        wanted = annotations.get(_TERMINATION_PATH_ANNOTATION, "/dev/termination-log")
        return next(
            (mounted.get("source") for mounted in mounts if mounted.get("destination") == wanted), None
        )

    def process(self, exec_id: str) -> Process:
        """By exec id; empty or the container's own id is the init. Raises NotFound."""
        if exec_id in ("", self.id):
            return self.init
        try:
            return self._execs[exec_id]
        except KeyError:
            raise NotFound(f"container {self.id} has no process {exec_id!r}") from None

    def newly_killed_for_memory(self) -> int:
        """How many of its processes the kernel has killed for lack of memory since this was last asked."""
        now = self.cgroup.flag("memory.events", "oom_kill")
        fresh, self._oom_kills = max(0, now - self._oom_kills), max(now, self._oom_kills)
        return fresh

    def processes(self) -> list[tuple[int, str]]:
        """The pids that live in the container, each with its exec id if it is the process of a running exec."""
        execs = {process.pid: name for name, process in self._execs.items() if process.running}
        return [(pid, execs.get(pid, "")) for pid in self.cgroup.pids()]

    # The verbs. The caller holds the lock.

    async def create(self) -> None:
        """Write the bundle and have the engine make the container. `clean_up` is for what is left when it fails."""
        os.makedirs(self.bundle, exist_ok=True)
        self._bind_rootfs()
        with open(f"{self.bundle}/config.json", "w") as file:
            file.write(dumps(self._config))
        started = await self._engine.create(
            self.id, self.bundle, terminal=_terminal(self._config["process"]), pipe_size=self._pipe_size
        )
        self._init = Process(self.id, started.pid, started.stdio, started.exited)
        # Where the pid namespace is the container's own the kernel does this; in a shared one nobody else does.
        started.exited.add_done_callback(lambda _exited: self.cgroup.kill())

    def _bind_rootfs(self) -> None:
        root = self._config["root"]
        assert isinstance(root, dict)
        target = f"{self.bundle}/rootfs"
        if root["path"] != target and not is_mount_point(target):
            os.makedirs(target, exist_ok=True)
            mount(str(root["path"]), target, "bind", ["rbind"])
        root["path"] = target

    async def start(self) -> None:
        """Raises StateConflict unless the container was just created."""
        if self._started or self._init is None:
            raise StateConflict(f"container {self.id} was started before")
        if not self._init.running:
            raise StateConflict(f"container {self.id} has ended before it was started")
        await self._engine.start(self.id)
        self._started = True

    async def exec(self, exec_id: str, process: Json) -> None:
        """Raises AlreadyExists while that exec id runs, StateConflict unless the container was created or runs."""
        if self.state not in (CREATED, RUNNING):
            raise StateConflict(f"cannot exec in container {self.id}: it is {self.state}")
        known = self._execs.get(exec_id)
        if exec_id in ("", self.id) or (known is not None and known.running):
            raise AlreadyExists(f"container {self.id} has a process {exec_id!r} already")
        started = await self._engine.exec(
            self.id, process, terminal=_terminal(process), pipe_size=self._pipe_size
        )
        if known is not None:
            self._drop(exec_id)
        self._execs[exec_id] = Process(exec_id, started.pid, started.stdio, started.exited)
        ended = [(name, process.owed) for name, process in self._execs.items() if not process.running]
        for owed, most in ((False, MAX_ENDED_EXECS), (True, MAX_OWED_EXECS)):
            names = [name for name, still in ended if still is owed]
            for name in names[: max(0, len(names) - most)]:
                self._drop(name)

    def _drop(self, exec_id: str) -> None:
        self._execs.pop(exec_id).stdio.close()

    def signal(self, exec_id: str, number: int) -> None:
        """SIGKILL to the container reaches every process of it. Raises NotFound."""
        process = self.process(exec_id)
        if exec_id in ("", self.id) and number == signal.SIGTERM and process.running:
            number = number if heeds(process.pid, number) else signal.SIGKILL
        if exec_id == "" and number == signal.SIGKILL:
            self.cgroup.kill()
        process.signal(number)

    async def pause(self, paused: bool) -> None:
        """Raises StateConflict in the wrong state. Returns when every process is stopped, or runs again."""
        wanted = RUNNING if paused else PAUSED
        if self.state != wanted:
            raise StateConflict(
                f"cannot {'pause' if paused else 'resume'} container {self.id}: it is {self.state}"
            )
        self.cgroup.freeze(paused)
        await until(self._watch, f"{self.cgroup.path}/cgroup.events", lambda: self.cgroup.frozen == paused)
        self._paused = paused

    async def update(self, resources: Json) -> None:
        if self.state == STOPPED:
            raise StateConflict(f"cannot update container {self.id}: it is stopped")
        await self._engine.update(self.id, resources)

    async def remove(self) -> None:
        """End every process and clean up, in an order in which nothing can be left over. May be repeated."""
        await self._empty()
        if self._has_hooks("poststop"):
            await self._engine.delete_with_hooks(self.id)
        for process in (self._init, *self._execs.values()):
            if process is not None:
                process.stdio.close()
        await self.clean_up()

    async def _empty(self) -> None:
        self.cgroup.kill()
        if self._init is not None:
            await self._init.wait()
        if self.cgroup.populated:
            await until(self._watch, f"{self.cgroup.path}/cgroup.events", lambda: not self.cgroup.populated)

    async def clean_up(self) -> None:
        """Of a container that was removed, or never quite made: processes, cgroup, the engine's files, bundle."""
        await self._empty()
        self.cgroup.remove()
        self._engine.forget(self.id)
        self._remove_bundle()

    def _remove_bundle(self) -> None:
        rootfs = f"{self.bundle}/rootfs"
        unmount(rootfs)
        # Directories are removed only when empty: were the unmount to fail, the container's files would survive.
        for remove, path in (
            (os.unlink, f"{self.bundle}/config.json"), (os.rmdir, rootfs), (os.rmdir, self.bundle),
        ):  # fmt: skip
            try:
                remove(path)
            except FileNotFoundError:
                continue

    def _has_hooks(self, kind: str) -> bool:
        hooks = self._config.get("hooks")
        return isinstance(hooks, dict) and bool(hooks.get(kind))


def _terminal(process: object) -> bool:
    return isinstance(process, dict) and bool(process.get("terminal"))

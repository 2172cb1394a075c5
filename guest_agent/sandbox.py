"""The sandbox: the whole guest, as the host set it up, with its containers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from typing import TYPE_CHECKING

from guest_agent import cgroup
from guest_agent.container import BUNDLES, RUNNING, STOPPED, Container
from guest_agent.errors import AlreadyExists, InvalidRequest, NotFound, StateConflict
from guest_agent.mount import is_mount_point, mount
from guest_agent.namespaces import adapt
from guest_agent.oci import spec_to_json
from guest_agent.storage import Storages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent_proto.gen import agent_pb2
    from guest_agent.crun import Crun
    from guest_agent.log import Log
    from guest_agent.modules import Modules
    from guest_agent.process import Process
    from guest_agent.watch import FileWatch

SANDBOX_DIR = "/run/kata-containers/sandbox"
#: The name under which the sandbox itself uses storages; no container id may contain a slash.
_SANDBOX_USER = "/sandbox"
MAX_ID_LENGTH = 200
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
#: Out-of-memory reports nobody fetched; more than that of one host say nothing new.
MAX_OOM_EVENTS = 128


class Sandbox:
    """Containers by id, storages, and what they share."""

    def __init__(
        self,
        engine: Crun,
        modules: Modules,
        watch: FileWatch,
        log: Log,
        *,
        pipe_size: int = 0,
        bundles: str = BUNDLES,
        cgroup_root: str = cgroup.ROOT,
    ) -> None:
        self.id = ""
        self.storages = Storages(modules)
        self.stopped = asyncio.Event()
        self._engine = engine
        self._modules = modules
        self._watch = watch
        self._log = log
        self._pipe_size = pipe_size
        self._prepared = False
        self._bundles = bundles
        self._cgroup_root = cgroup_root
        self._containers: dict[str, Container] = {}
        self._oom_events: deque[str] = deque(maxlen=MAX_OOM_EVENTS)
        self._oom_waiting = asyncio.Event()

    def container(self, container_id: str) -> Container:
        """Raises NotFound."""
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFound(f"there is no container {container_id!r}") from None

    def process(self, container_id: str, exec_id: str) -> Process:
        """Raises NotFound."""
        return self.container(container_id).process(exec_id)

    def prepare(self) -> None:
        """What the first container needs done, if it is not done yet. Raises OSError."""
        if not self._prepared:
            self._engine.prepare()
            cgroup.enable_controllers(self._cgroup_root)
            self._prepared = True

    def create(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """Set the guest up. Raises AlreadyExists the second time, ModuleMissing, InvalidRequest, OSError."""
        if self.id:
            raise AlreadyExists(f"this guest is sandbox {self.id} already")
        for module in request.kernel_modules:
            self._modules.load(module.name, " ".join(module.parameters))
        os.makedirs(SANDBOX_DIR, exist_ok=True)
        # Without a name of its own a machine is called "(none)", which programs take for an error.
        socket.sethostname(request.hostname[:64] or "localhost")
        self.storages.add(request.storages, _SANDBOX_USER)
        if request.dns:
            _write_resolv_conf(request.dns)
        self.id = request.sandbox_id or "sandbox"

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Create a container up to the point where its program could run. All or nothing.

        Raises InvalidRequest, AlreadyExists, EngineFailed, NotSupported, OSError.
        """
        container_id = request.container_id
        check_id(container_id)
        if container_id in self._containers:
            raise AlreadyExists(f"there is a container {container_id} already")
        if not request.HasField("OCI") or not request.OCI.HasField("Process") or not request.OCI.Root.Path:
            raise InvalidRequest(f"container {container_id} has no specification with a process and a root")
        self.prepare()
        config = spec_to_json(request.OCI)
        adapt(config, container_id, self._shared_pid_namespace() if request.sandbox_pidns else "")
        container = Container(
            container_id,
            config,
            self._engine,
            self._watch,
            pipe_size=self._pipe_size,
            bundles=self._bundles,
            cgroup_root=self._cgroup_root,
        )
        self._containers[container_id] = container
        try:
            async with container.lock:
                self.storages.add(request.storages, container_id)
                await container.create()
        except BaseException:
            self.storages.release(container_id)
            del self._containers[container_id]
            raise
        self._watch_memory(container)

    def _shared_pid_namespace(self) -> str:
        """That of the oldest container that is alive, which in a pod is the sandbox container."""
        for container in self._containers.values():
            if container.state != STOPPED:
                return container.pid_namespace
        raise StateConflict("no container is running whose pid namespace could be shared")

    async def remove_container(self, container_id: str, timeout_s: float | None) -> None:
        """End and forget a container. Raises NotFound, TimeoutError (it can be asked again), OSError."""
        container = self.container(container_id)
        async with asyncio.timeout(timeout_s), container.lock:
            await container.remove()
        self._containers.pop(container_id, None)
        self.storages.release(container_id)

    async def destroy(self) -> None:
        """End every container, write everything to disk, and say that the machine may stop."""
        for container_id in list(self._containers):
            try:
                await self.remove_container(container_id, timeout_s=5)
            except (TimeoutError, OSError) as err:
                self._log.warning("container_not_removed", container=container_id, error=str(err))
        os.sync()
        self.stopped.set()

    def _watch_memory(self, container: Container) -> None:
        """Report processes that the kernel killed for lack of memory."""
        killed = container.cgroup.flag("memory.events", "oom_kill")

        def changed() -> None:
            nonlocal killed
            now = container.cgroup.flag("memory.events", "oom_kill")
            if now > killed:
                self._log.warning("out_of_memory", container=container.id, killed=now - killed)
                self._oom_events.append(container.id)
                self._oom_waiting.set()
            killed = max(now, killed)

        try:
            self._watch.add(f"{container.cgroup.path}/memory.events", changed)
        except OSError as err:
            self._log.warning("memory_events_unavailable", container=container.id, error=str(err))

    async def next_oom(self) -> str:
        """Id of the next container that ran out of memory."""
        while not self._oom_events:
            self._oom_waiting.clear()
            await self._oom_waiting.wait()
        return self._oom_events.popleft()

    @property
    def running(self) -> int:
        return sum(1 for container in self._containers.values() if container.state == RUNNING)


def check_id(container_id: str) -> None:
    """Ids become directory names. Raises InvalidRequest for one that could be anything else."""
    if not container_id or len(container_id) > MAX_ID_LENGTH:
        raise InvalidRequest(f"a container id has 1 to {MAX_ID_LENGTH} characters, not {len(container_id)}")
    if not _ID_CHARACTERS.issuperset(container_id) or container_id[0] in ".-":
        raise InvalidRequest(
            f"container id {container_id!r} has characters other than letters, digits, '_', '.', '-'"
        )
    if container_id in ("sandbox", "shared"):
        raise InvalidRequest(f"container id {container_id!r} is the name of a directory of the agent")


def _write_resolv_conf(lines: Iterable[str]) -> None:
    path = f"{SANDBOX_DIR}/resolv.conf"
    with open(path, "w") as file:
        file.write("\n".join(lines).rstrip("\n") + "\n")
    target = "/etc/resolv.conf"
    if not os.path.exists(target):
        with open(target, "w"):
            pass
    if not is_mount_point(target):
        mount(path, target, "bind")

"""The sandbox: the whole guest, as the host set it up, with its containers."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from typing import TYPE_CHECKING

from guest_agent import cgroup, machine, spawn
from guest_agent.container import BUNDLES, RUNNING, STOPPED, Container
from guest_agent.devices import drivers_for
from guest_agent.errors import AlreadyExists, InvalidRequest, NotFound, NotSupported, StateConflict
from guest_agent.mount import is_mount_point, mount
from guest_agent.namespaces import adapt
from guest_agent.oci import spec_to_json
from guest_agent.oom import OomReports
from guest_agent.storage import SANDBOX_USER, Storages, flush

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from agent_proto.gen import agent_pb2
    from guest_agent.engine import Engine
    from guest_agent.handover import Handover
    from guest_agent.host_sockets import HostSockets
    from guest_agent.log import Log
    from guest_agent.mirror import Mirrors
    from guest_agent.modules import Modules
    from guest_agent.names import NameServer
    from guest_agent.pidns import PidNamespace
    from guest_agent.process import Process
    from guest_agent.reaper import Reaper
    from guest_agent.watch import FileWatch

SANDBOX_DIR = "/run/kata-containers/sandbox"
MAX_ID_LENGTH = 200
#: How long the agent waits, where no host says so, for killed processes to be gone. One may hang in the kernel.
END_LIMIT_S = 5.0
#: Fields of CreateContainerRequest and ExecProcessRequest.
_UNSUPPORTED = ("string_user", "devices", "shared_mounts", "stdin_port", "stdout_port", "stderr_port")
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class Sandbox:
    """Containers by id, storages, and what they share."""

    def __init__(
        self,
        engine: Engine,
        modules: Modules,
        watch: FileWatch,
        reaper: Reaper,
        log: Log,
        *,
        pipe_size: int = 0,
        bundles: str = BUNDLES,
        cgroup_root: str = cgroup.ROOT,
    ) -> None:
        self.id = ""
        self.storages = Storages(modules, reaper)
        self.stopped = asyncio.Event()
        self._engine = engine
        self._modules = modules
        self._watch = watch
        self._reaper = reaper
        self._log = log
        self._pipe_size = pipe_size
        self._prepared = False
        self._bundles = bundles
        self._cgroup_root = cgroup_root
        self._containers: dict[str, Container] = {}
        self._sandbox_container: Container | None = None
        self._own_pid_namespace: PidNamespace | None = None
        self._mirrors: Mirrors | None = None
        self._names: NameServer | None = None
        self._handover: Handover | None = None
        self._host_sockets: HostSockets | None = None
        self._memory_watches: dict[str, int] = {}
        self.oom_reports = OomReports()

    def container(self, container_id: str) -> Container:
        """Raises NotFound."""
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFound(f"there is no container {container_id!r}") from None

    def process(self, container_id: str, exec_id: str) -> Process:
        """Raises NotFound."""
        return self.container(container_id).process(exec_id)

    def load_driver(self, name: str) -> None:
        """Load a kernel module that the image brings, unless it is built in. Raises OSError."""
        self._modules.load_if_present(name)

    @property
    def mirrors(self) -> Mirrors:
        """The copies of the host's directories."""
        if self._mirrors is None:
            from guest_agent.mirror import Mirrors

            self._mirrors = Mirrors(f"{SANDBOX_DIR}/mirrors")
        return self._mirrors

    @property
    def names(self) -> NameServer:
        """The pod's name server."""
        if self._names is None:
            from guest_agent.names import NameServer

            self._names = NameServer(self._log)
        return self._names

    @property
    def handover(self) -> Handover:
        """The connections that the host takes over."""
        if self._handover is None:
            from guest_agent.handover import Handover

            self._handover = Handover(self._log)
        return self._handover

    @property
    def host_sockets(self) -> HostSockets:
        """The sockets that stand for the host's."""
        if self._host_sockets is None:
            from guest_agent.host_sockets import HostSockets

            self._host_sockets = HostSockets(f"{SANDBOX_DIR}/sockets", self.handover)
        return self._host_sockets

    def prepare(self) -> None:
        """What the first container needs done, if it is not done yet. Raises OSError."""
        if not self._prepared:
            self._engine.prepare()
            cgroup.enable_controllers(self._cgroup_root)
            self._prepared = True

    async def create(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """Set the guest up. Raises AlreadyExists the second time, ModuleMissing, InvalidRequest, OSError."""
        if self.id:
            raise AlreadyExists(f"this guest is sandbox {self.id} already")
        self.id = request.sandbox_id or "sandbox"
        try:
            await self._set_up(request)
        except BaseException:
            self.id = ""
            raise

    async def _set_up(self, request: agent_pb2.CreateSandboxRequest) -> None:
        self._modules.load_for_devices()
        for module in request.kernel_modules:
            self._modules.load(module.name, " ".join(module.parameters))
        os.makedirs(SANDBOX_DIR, exist_ok=True)
        # Without a name of its own a machine is called "(none)", which programs take for an error.
        socket.sethostname(request.hostname[:64] or "localhost")
        machine.raise_loopback()
        await self.storages.add(request.storages, SANDBOX_USER)
        if request.guest_hook_path:
            self._log.warning("guest_hooks_not_run", path=request.guest_hook_path)
        if request.dns:
            _write_resolv_conf(request.dns)

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Create a container up to the point where its program could run. All or nothing.

        Raises InvalidRequest, AlreadyExists, EngineFailed, NotSupported, StateConflict, OSError.
        """
        container_id = request.container_id
        check_id(container_id)
        refuse_unsupported(request, f"container {container_id}")
        if container_id in self._containers:
            raise AlreadyExists(f"there is a container {container_id} already")
        if not request.HasField("OCI") or not request.OCI.HasField("Process") or not request.OCI.Root.Path:
            raise InvalidRequest(f"container {container_id} has no specification with a process and a root")
        self.prepare()
        for driver in drivers_for(request.OCI):
            self.load_driver(driver)
        config = spec_to_json(request.OCI)
        dropped = adapt(config, container_id, self._shared_pid_namespace() if request.sandbox_pidns else "")
        if dropped:
            self._log.info("not_of_this_guest", container=container_id, dropped=", ".join(dropped))
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
                await self.storages.add(request.storages, container_id)
                try:
                    await container.create()
                except BaseException:
                    await self._discard(container)
                    raise
        except BaseException:
            del self._containers[container_id]
            self.storages.release(container_id)
            raise
        if self._sandbox_container is None and container.may_hold_pod:
            self._sandbox_container = container
        self._watch_memory(container)

    async def _discard(self, container: Container) -> None:
        """What is there of a container that was never quite made."""
        try:
            async with asyncio.timeout(END_LIMIT_S):
                await container.clean_up()
        except (TimeoutError, OSError) as err:
            self._log_not_removed(container.id, err)

    def _log_not_removed(self, container_id: str, err: Exception) -> None:
        problem = str(err) or "a process does not end"
        self._log.warning("container_not_removed", container=container_id, error=problem)

    def _shared_pid_namespace(self) -> str:
        """That of the sandbox container; in a pod that has none, one of the sandbox's own."""
        owner = self._sandbox_container
        if owner is not None:
            if owner.state == STOPPED:
                raise StateConflict(f"sandbox container {owner.id} has ended, and its pid namespace with it")
            return owner.pid_namespace
        from guest_agent.pidns import PidNamespace

        if self._own_pid_namespace is None or self._own_pid_namespace.ended:
            self._own_pid_namespace = PidNamespace.make(self._reaper)
        return self._own_pid_namespace.path

    async def remove_container(self, container_id: str, timeout_s: float | None) -> None:
        """End and forget a container. Raises NotFound, TimeoutError (it can be asked again), OSError."""
        container = self.container(container_id)
        async with asyncio.timeout(timeout_s), container.lock:
            await container.remove()
            await self._flush(container_id)
        self._containers.pop(container_id, None)
        # The kernel does not say that a file of a cgroup is gone: without this the container would be kept.
        handle = self._memory_watches.pop(container_id, None)
        if handle is not None:
            self._watch.remove(handle)
        if container is self._sandbox_container:
            self._sandbox_container = None
        self.storages.release(container_id)

    async def _flush(self, container_id: str) -> None:
        """Write to its disks what the container has written, aside: others are not to wait for that."""
        for mount_point in self.storages.disks_of(container_id):
            try:
                await spawn.aside(self._reaper, partial(flush, mount_point))
            except OSError as err:
                self._log.error("disk_not_written", mount_point=mount_point, error=str(err))

    async def destroy(self) -> None:
        """End every container, write everything to disk, and say that the machine may stop."""
        for container_id in list(self._containers):
            try:
                await self.remove_container(container_id, timeout_s=END_LIMIT_S)
            except (TimeoutError, OSError) as err:
                self._log_not_removed(container_id, err)
        if self._own_pid_namespace is not None:
            await self._own_pid_namespace.end()
        os.sync()
        self.stopped.set()

    async def wait(self, container_id: str, exec_id: str) -> int:
        """The exit code of a process, after the host was told if its container ran out of memory before.

        Raises NotFound.
        """
        container = self.container(container_id)
        code = await container.process(exec_id).wait()
        self._report_memory(container)
        await self.oom_reports.fetched(container_id)
        return code

    def _watch_memory(self, container: Container) -> None:
        try:
            self._memory_watches[container.id] = self._watch.add(
                f"{container.cgroup.path}/memory.events", partial(self._report_memory, container)
            )
        except OSError as err:
            self._log.warning("memory_events_unavailable", container=container.id, error=str(err))

    def _report_memory(self, container: Container) -> None:
        """Tell the host if the kernel has killed processes for lack of memory since the last look."""
        killed = container.newly_killed_for_memory()
        if killed:
            self._log.warning("out_of_memory", container=container.id, killed=killed)
            self.oom_reports.add(container.id)

    @property
    def running(self) -> int:
        return sum(1 for container in self._containers.values() if container.state == RUNNING)


def refuse_unsupported(request: Message, what: str) -> None:
    """Fields that this agent has no answer to. Raises NotSupported naming those that are set."""
    names = [
        name for name in _UNSUPPORTED if name in request.DESCRIPTOR.fields_by_name and _is_set(request, name)
    ]
    if names:
        raise NotSupported(f"{what}: {', '.join(names)} of {request.DESCRIPTOR.name}")


def _is_set(request: Message, name: str) -> bool:
    field = request.DESCRIPTOR.fields_by_name[name]
    return request.HasField(name) if field.has_presence else bool(getattr(request, name))


def refuse_nul(request: Message) -> None:
    """Raises InvalidRequest for texts that cannot be paths, names or arguments. Not for requests with bytes in them.

    protobuf's own text, which native code writes, has such a character as \\000, and a backslash as two.
    """
    if "\\000" in str(request).replace("\\\\", ""):
        raise InvalidRequest(f"{request.DESCRIPTOR.name}: a text in it has a NUL character")


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
    target = "/etc/resolv.conf"  # it may be read-only, and is empty in the image
    if not is_mount_point(target):
        mount(path, target, "bind")

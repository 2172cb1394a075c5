"""How a sandbox's guest comes up: the machine, the agent's connection, and the time each took.

What the machine is to be is decided by `shim.plan`. The first thing the daemon does is to get QEMU going, so these two
modules and what they import at their top are all that runs before; protobuf, the RPC server and the rest of the daemon
load while the guest's kernel boots. Only with the Sandbox API has the machine to wait: its network namespace comes with
`CreateSandbox`.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from config import ConfigError
from hypervisor.errors import HostUnsupported, HypervisorError
from hypervisor.qemu.machine import booted
from shim import paths
from shim.agent import ReadySignal
from shim.bundle import Bundle
from shim.errors import GuestUnreachable, ShimError
from shim.log import set_levels
from shim.network import network_of
from shim.plan import load_config, plan
from shim.pod import pod_from_bundle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent_proto.client import AgentClient
    from config import Config, LoadedConfig
    from hypervisor.qemu.machine import Machine
    from hypervisor.spec import VmSpec
    from shim.bootstrap import Bootstrap
    from shim.network import PodNetwork
    from shim.passthrough import PodDevices
    from shim.pod import Pod
    from shim.serve import HostState
    from shim.sizing import Sizing

log = structlog.get_logger()


class Plan(NamedTuple):
    """What a machine is started with."""

    loaded: LoadedConfig
    spec: VmSpec


class Boot:
    """One guest on its way up; who needs it waits for `machine`.

    `failure` is set when there is nothing to start: a bundle, a configuration or a host that will not do. Otherwise
    `config` and `pod` exist from the launch on: the daemon's first moment when the bundle describes the pod (`bundle`
    is its first container's), else when somebody calls `launch`.
    """

    bundle: Bundle | None = None
    _network: PodNetwork | None = None
    _devices: PodDevices | None = None
    config: Config
    pod: Pod
    _loaded: LoadedConfig

    def __init__(self, bootstrap: Bootstrap, host: HostState, started_at: float) -> None:
        self.failure: Exception | None = None
        # Seconds of the monotonic clock, in order of their happening.
        self.moments: dict[str, float] = {"start": started_at}
        self._sandbox_id = bootstrap.id
        self._options = bootstrap.options
        self._debug = bootstrap.debug
        self._host = host
        self._closed = False
        self._undo = ExitStack()
        self._expect_machine()
        try:
            host.create()
            if not bootstrap.sandbox_api:
                self.bundle = Bundle.load(bootstrap.id, Path(bootstrap.bundle))
                self.launch(pod_from_bundle(self.bundle))
        except (ShimError, ConfigError, HypervisorError, OSError) as err:
            self.failure = err
            self._undo.close()

    def _expect_machine(self) -> None:
        self._ready = ReadySignal()
        self._release = asyncio.Event()
        self._machine: asyncio.Future[Machine] = asyncio.get_running_loop().create_future()
        self._owner: asyncio.Task[None] | None = None

    def launch(self, pod: Pod) -> None:
        """Begin to start the machine.

        Raises:
            ConfigError: the configuration, or what the pod's annotations make of it, cannot be used.
            HostUnsupported, ProgramNotFound: an explicit setting cannot work here.
            GuestUnreachable: it has been taken down already.
            OSError: what every guest is to see cannot be mounted, or its initial data cannot be written.
        """
        if self._closed:
            raise GuestUnreachable(f"sandbox {self._sandbox_id} is stopping")
        made = self.planned(pod)
        self.pod = pod
        if made.spec.initdata is not None:
            from shim.confidential import write_initdata

            write_initdata(made.loaded.config.hypervisor, made.spec.initdata)
        if entries := made.loaded.config.runtime.sandbox_bind_mounts:
            self._host.share.add_sandbox_mounts(entries)
        self._begin(made)

    @property
    def network(self) -> PodNetwork:
        """The pod's network, from the launch on."""
        assert self._network is not None
        return self._network

    @property
    def devices(self) -> PodDevices:
        """The host's devices of the machine that was begun last."""
        if self._devices is None:
            from shim import preload
            from shim.passthrough import PodDevices

            if self.config.hypervisor.hot_plug_vfio != "no-port":
                preload.load(preload.FOR_HOST_DEVICES)
            self._devices = PodDevices(self.config)
        return self._devices

    @property
    def machine_type_set_by(self) -> str | None:
        """The file or annotation that fixes the type of machine; None while the default applies."""
        return self._loaded.origins.get("hypervisor.qemu.machine_type")

    def planned(self, pod: Pod, machine_type: str = "") -> Plan:
        """What `pod` is started with; a `machine_type` is that of its image. Raises as `launch` does."""
        loaded = load_config(self._options, pod, machine_type)
        if not self._debug:  # else containerd wants everything
            set_levels(loaded.config.runtime.log_level, loaded.config.hypervisor.log_level)
        if self._network is None:
            self._network = network_of(pod, loaded.config, self._sandbox_id, self._host.remember_network)
            self._undo.callback(self._network.close)
        exported = self._host.share.exported
        spec = plan(
            loaded.config,
            self._sandbox_id,
            exported=exported,
            network=self._network,
            limits=pod.resources,
        )
        return Plan(loaded, spec)

    async def replace(self, other: Plan) -> None:
        """End the machine, which nobody uses any more, and begin to start another one for the same pod.

        Raises:
            GuestUnreachable: all has been taken down meanwhile.
        """
        await self._end()
        if self._closed:
            raise GuestUnreachable(f"sandbox {self._sandbox_id} is stopping")
        self._expect_machine()
        self._begin(other)

    def _begin(self, made: Plan) -> None:
        self._loaded, self.config = made.loaded, made.loaded.config
        self._devices = None
        self._owner = asyncio.create_task(self._own(made.spec), name="machine")

    async def launched(self) -> None:
        """Let the machine's task run: it starts QEMU before it waits for anything for the first time."""
        await asyncio.sleep(0)

    async def machine(self) -> Machine:
        """The running machine (its guest may still boot). Raises HypervisorError."""
        return await asyncio.shield(self._machine)

    async def aclose(self) -> None:
        """Kill the machine and wait until nothing of it is left. Harmless when repeated."""
        self._closed = True
        await self._end()
        self._undo.close()

    async def _end(self) -> None:
        self._release.set()
        if self._owner is not None:
            if not self._machine.done():
                self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)
        if self._network is not None:
            self._network.part()

    async def _own(self, spec: VmSpec) -> None:
        try:
            if self.config.hypervisor.cold_plug_vfio != "no-port":
                spec = replace(spec, host_devices=await self.devices.at_start(self.pod, self.bundle))
            listeners = {spec.ready_vport: self._ready.on_connection} if spec.ready_vport is not None else {}
            async with booted(spec, listeners=listeners) as machine:
                self.moments |= machine.timings
                self._host.remember_helpers(machine.pids)
                self.network.join()
                self._machine.set_result(machine)
                self._record_settings()  # the guest's kernel boots meanwhile
                await self._release.wait()
        except Exception as err:
            if self._machine.done():
                log.exception("machine_teardown_failed")
            else:
                self._machine.set_exception(err)
                # Asked for by `machine()`, perhaps later, perhaps never: not an error of the loop's.
                self._machine.exception()

    async def confine(self, machine: Machine) -> None:
        """With `sandbox_cgroup_only`: all of the sandbox's processes live in the pod's control group from now on.

        Raises:
            HostUnsupported: they cannot.
        """
        if not self.config.runtime.sandbox_cgroup_only:
            return
        from shim.background import apart
        from shim.host_cgroup import path_of

        named = self.pod.cgroup
        try:
            if not (path := path_of(named)):
                log.warning("pod_without_cgroup", reason="its spec has no cgroupsPath")
                return
            group = self._host.own_cgroup(path)
            await apart(partial(group.create_and_join, [*machine.pids.values()]))
        except (OSError, ValueError) as err:
            raise HostUnsupported(
                f"sandbox_cgroup_only: cannot move into the pod's control group {named}: {err}; "
                "make it possible, or set sandbox_cgroup_only = false"
            ) from err

    async def divide(self, machine: Machine, sizing: Sizing) -> None:
        """Without `sandbox_cgroup_only`: the machine's processors live in the pod's control group from now on, and all
        else of the sandbox in one for overhead. A host where that cannot be done runs pods as well, but does not count
        what they use."""
        if self.config.runtime.sandbox_cgroup_only:
            return
        from shim.background import apart
        from shim.host_cgroup import overhead_path, path_of

        named = self.pod.cgroup
        try:
            group = self._host.own_cgroup(path_of(named), overhead_path(named, self._sandbox_id))
            await apart(partial(group.create_and_join, [*machine.pids.values()]))
            await sizing.keep_in(group, self._sandbox_id, self.pod.resources.memory_bytes)
        except (OSError, ValueError, HypervisorError) as err:
            log.warning(
                "sandbox_not_in_its_cgroups",
                error=f"{err}; what it uses is not counted as its pod's, and not limited by the pod's limits",
            )

    def _record_settings(self) -> None:
        from config.show import encode

        try:
            (self._host.run_dir / paths.CONFIG_FILE).write_bytes(encode(self._loaded))
        except OSError as err:
            log.warning("settings_not_written", error=str(err))

    @asynccontextmanager
    async def agent(self, machine: Machine) -> AsyncIterator[AgentClient]:
        """The connection to the machine's agent. Raises GuestUnreachable, BootFailed."""
        from shim.agent import connected

        async with connected(
            machine, self.config.agent, self._ready, self.config.hypervisor.boot_timeout_s
        ) as client:
            self.moments["agent"] = time.monotonic()
            yield client

    def report(self) -> None:
        """Tell, in the log and in `timings.json`, where the time of this start went."""
        self.moments["sandbox"] = time.monotonic()
        if self._ready.came_at is not None:
            self.moments["agent_ready"] = self._ready.came_at
        seconds = {
            name: round(at - self.moments["start"], 4) for name, at in self.moments.items() if name != "start"
        }
        guest = self._ready.boot_times()
        try:
            (self._host.run_dir / "timings.json").write_text(json.dumps({"host": seconds, "guest": guest}))
        except OSError as err:
            log.warning("timings_not_written", error=str(err))
        log.info("sandbox_up", **{f"{name}_s": value for name, value in seconds.items()}, **guest)

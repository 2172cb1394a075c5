"""How a sandbox's guest comes up: the host's choices, the machine, the agent's connection, and the time each took.

The first thing the daemon does is to get QEMU going, so this module and what it imports at its top are all that runs
before; protobuf, the RPC server and the rest of the daemon load while the guest's kernel boots.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from config import ConfigError, load
from hypervisor.accel import choose_accel, choose_vsock
from hypervisor.errors import HypervisorError
from hypervisor.host import Host
from hypervisor.qemu.machine import booted
from shim.agent import READY_PORT, ReadySignal
from shim.bootstrap import config_path
from shim.bundle import Bundle
from shim.errors import ShimError
from shim.vmspec import vm_spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent_proto.client import AgentClient
    from config import Config
    from hypervisor.qemu.machine import Machine
    from hypervisor.spec import VmSpec
    from shim.bootstrap import Bootstrap
    from shim.serve import HostState

log = structlog.get_logger()


def load_config(options: bytes) -> Config:
    """The configuration that the runtime options name, or the default one; its warnings are logged.

    Raises:
        ConfigError: every problem, with file and key.
    """
    path = config_path(options)
    loaded = load(Path(path) if path else None)
    for warning in loaded.warnings:
        log.warning("configuration_warning", file=str(loaded.path or "built-in defaults"), warning=warning)
    return loaded.config


def plan(config: Config, sandbox_id: str, *, exported: Path, netns: Path | None) -> VmSpec:
    """Decide what depends on the host, and say so once where the second best is taken.

    Raises:
        HostUnsupported, ProgramNotFound: an explicit setting cannot work here.
    """
    qemu = config.hypervisor
    accel, vsock = choose_accel(qemu.accel), choose_vsock(qemu.vsock)
    if accel.reason:
        log.warning("accel_fallback", accel=accel.value, reason=accel.reason)
    if vsock.reason:
        log.info("vsock_fallback", vsock=vsock.value, reason=vsock.reason)
    return vm_spec(
        config,
        sandbox_id,
        accel=accel.value,
        vsock=vsock.value,
        virtiofsd=Path(qemu.virtio_fs_daemon) if qemu.shared_fs != "none" else None,
        exported=exported,
        netns=netns,
        tsc_khz=Host().tsc_khz(),
    )


class Boot:
    """One guest on its way up, from the daemon's first moment on; who needs it waits for `machine`.

    `failure` is set when there is nothing to start: a bundle, a configuration or a host that will not do. `bundle`
    and `config` exist otherwise.
    """

    bundle: Bundle
    config: Config

    def __init__(self, bootstrap: Bootstrap, host: HostState, started_at: float) -> None:
        self.failure: Exception | None = None
        # Seconds of the monotonic clock, in order of their happening.
        self.moments: dict[str, float] = {"start": started_at}
        self._host = host
        self._ready = ReadySignal()
        self._release = asyncio.Event()
        self._machine: asyncio.Future[Machine] = asyncio.get_running_loop().create_future()
        self._owner: asyncio.Task[None] | None = None
        try:
            host.create()
            self.bundle = Bundle.load(bootstrap.id, Path(bootstrap.bundle))
            self.config = load_config(bootstrap.options)
            spec = plan(self.config, bootstrap.id, exported=host.share.exported, netns=self.bundle.spec.netns)
        except (ShimError, ConfigError, HypervisorError, OSError) as err:
            self.failure = err
            return
        self._owner = asyncio.create_task(self._own(spec), name="machine")

    async def launched(self) -> None:
        """Let the machine's task run: it starts QEMU before it waits for anything for the first time."""
        await asyncio.sleep(0)

    async def machine(self) -> Machine:
        """The running machine (its guest may still boot). Raises HypervisorError."""
        return await asyncio.shield(self._machine)

    async def aclose(self) -> None:
        """Kill the machine and wait until nothing of it is left. Harmless when repeated."""
        self._release.set()
        if self._owner is not None:
            if not self._machine.done():
                self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)

    async def _own(self, spec: VmSpec) -> None:
        try:
            async with booted(spec, listeners={READY_PORT: self._ready.on_connection}) as machine:
                self.moments |= machine.timings
                self._host.remember_helpers(machine.pids)
                self._machine.set_result(machine)
                await self._release.wait()
        except Exception as err:
            if self._machine.done():
                log.exception("machine_teardown_failed")
            else:
                self._machine.set_exception(err)
                # Asked for by `machine()`, perhaps later, perhaps never: not an error of the loop's.
                self._machine.exception()

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

"""A guest is brought up: from a machine that boots to an agent that has been told all of its sandbox.

How the machine boots, and how its agent is found, is `shim.boot`. What follows is here, in order: the policy, the
network, the sandbox itself. What then serves the guest for as long as it is up hangs on `RunningGuest`; another machine
in its place gets all of that anew.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen import agent_pb2
from shim import agent_log, oom
from shim.agent import answered
from shim.clock import GuestClock
from shim.errors import NotSupported
from shim.guest import Guest
from shim.liveness import Liveness
from shim.log import number_of
from shim.management import Management
from shim.names import Names
from shim.share import GUEST_ROOT, GUEST_SHM, TAG
from shim.sizing import Sizing
from shim.vmspec import shares_by_9p, wants_agent_log
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent_proto.client import AgentClient
    from config import Config
    from hypervisor.qemu.machine import Machine
    from shim.background import InBackground
    from shim.boot import Boot
    from shim.container import Container
    from shim.pod import Pod

log = structlog.get_logger()

# The guest's time to end what still runs in it, and to write to its disks, when the sandbox is stopped.
_WRITE_OUT_LIMIT_S = 10.0


class RunningGuest:
    """A guest that is up, and what of this process serves it. `resources` end with it: the agent's connection.
    `host_mounts` is the mount namespace that disks are looked for in."""

    def __init__(
        self,
        boot: Boot,
        machine: Machine,
        agent: AgentClient,
        in_background: InBackground,
        *,
        host_mounts: int | None,
        resources: AsyncExitStack,
    ) -> None:
        from shim.disks import Disks
        from shim.guest_swap import GuestSwap
        from shim.host_sockets import HostSockets
        from shim.mirror import Mirrors

        config = boot.config
        self.machine = machine
        self.agent = agent
        self.guest = Guest(agent, machine.pid, _liveness(config, agent, machine))
        self.network = boot.network
        self.sizing = Sizing(machine, self.guest, config, in_background)
        # A confidential guest takes no time from the host.
        self.clock = None if config.hypervisor.confidential_guest else GuestClock(agent)
        self.names = Names(agent, boot.network, in_background)
        self.mirrors = Mirrors(in_background)
        self.host_sockets = HostSockets(self.guest, machine.vsock, in_background)
        self.disks = Disks(machine, host_mounts)
        self.swap = GuestSwap(machine, agent, config.hypervisor.guest_swap_path)
        # The kernel takes some milliseconds for it, which the first container needs for other things.
        self._dividing = asyncio.create_task(
            boot.divide(machine, self.sizing), name="divide among control groups"
        )
        self._resources = resources

    async def divided(self) -> None:
        """Wait until the sandbox is in its control groups on the host, or cannot be."""
        await asyncio.wait([self._dividing])

    async def retire(self, *, write_out: bool) -> None:
        """Nothing of the host is followed any more. With `write_out` the guest writes to its disks what containers that
        still run have written, as a machine does that is shut down. What runs in the background has ended."""
        self._dividing.cancel()
        self.mirrors.close()
        await self.disks.aclose()
        if not write_out or not self.disks.writes():
            return
        try:
            async with asyncio.timeout(_WRITE_OUT_LIMIT_S):
                await self.agent.destroy_sandbox(agent_pb2.DestroySandboxRequest())
        except (RpcError, TimeoutError) as err:
            log.warning("disks_not_written", error=str(err) or "the guest does not answer")

    async def aclose(self) -> None:
        """Close the connection to the agent."""
        await self._resources.aclose()


async def bring_up(
    boot: Boot,
    machine: Machine,
    sandbox_id: str,
    containers: Mapping[str, Container],
    in_background: InBackground,
    *,
    host_mounts: int | None,
) -> RunningGuest:
    """Wait for the machine's agent, and make the sandbox in the guest. `containers` are those that memory may run out
    for, now and later.

    Raises:
        NotSupported, GuestUnreachable, HypervisorError, RpcError (the agent).
    """
    async with AsyncExitStack() as undo:
        agent = await undo.enter_async_context(boot.agent(machine))
        if policy := boot.config.agent.policy:
            await _set_policy(agent, policy, machine)
        await answered(boot.network.tell(agent), machine)
        await answered(agent.create_sandbox(_request(sandbox_id, boot.config, boot.pod)), machine)
        await boot.confine(machine)  # not before: the pod's CPU limit is not for the guest's boot
        running = RunningGuest(
            boot, machine, agent, in_background, host_mounts=host_mounts, resources=undo.pop_all()
        )
    if running.clock is not None:
        in_background(running.clock.follow(), "follow the clock")
    in_background(boot.network.follow(agent, machine), "follow the network")
    in_background(oom.watch(agent, containers), "watch for OOM")
    _forward_ports(running, boot, in_background)
    in_background(Management(agent, running.disks).serve(sandbox_id), "answer about volumes")
    if wants_agent_log(boot.config):
        level = number_of(boot.config.agent.log_level)
        in_background(agent_log.forward(machine, boot.config.agent.log_port, level), "agent's log")
    return running


def _forward_ports(running: RunningGuest, boot: Boot, in_background: InBackground) -> None:
    from shim.port_forward import PortForward, namespace_of

    if (netns := namespace_of(boot.pod)) is not None:
        forward = PortForward(running.guest, running.machine.vsock, netns)
        in_background(forward.serve(), "forward ports")


async def _set_policy(agent: AgentClient, policy: str, machine: Machine) -> None:
    """Let the agent enforce a policy from now on.

    Raises:
        NotSupported: it cannot.
        BootFailed, RpcError: as of any call.
    """
    try:
        await answered(agent.set_policy(agent_pb2.SetPolicyRequest(policy=policy)), machine)
    except RpcError as err:
        if err.code is not Code.UNIMPLEMENTED:
            raise
        raise NotSupported(
            "policy of [agent.kata] is set, and the guest's agent enforces none; remove it, or use a guest that does"
        ) from err


def _liveness(config: Config, agent: AgentClient, machine: Machine) -> Liveness:
    return Liveness(
        agent,
        None if config.runtime.keep_abnormal else machine.stop,
        check_s=config.agent.health_check_request_timeout_ms / 1000,
    )


def _request(sandbox_id: str, config: Config, pod: Pod) -> agent_pb2.CreateSandboxRequest:
    shm = agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        options=["noexec", "nosuid", "nodev", "mode=1777", f"size={pod.shm_size}"],
        mount_point=GUEST_SHM,
    )
    words = [module.split() for module in config.agent.kernel_modules]
    return agent_pb2.CreateSandboxRequest(
        hostname=pod.hostname[:64],
        dns=pod.dns,
        storages=[*_shared_dir(config), shm],
        sandbox_id=sandbox_id,
        guest_hook_path=config.hypervisor.guest_hook_path,
        kernel_modules=[agent_pb2.KernelModule(name=name, parameters=rest) for name, *rest in words],
    )


def _shared_dir(config: Config) -> list[agent_pb2.Storage]:
    """How the guest mounts the shared directory, if there is one."""
    qemu = config.hypervisor
    if qemu.shared_fs == "none":
        return []
    # Not nodev: a node that a container makes is a device, as on a host. Which it may open says its control group.
    driver, fstype = "virtio-fs", "virtiofs"
    options: list[str] = []
    if qemu.virtio_fs_cache_size and qemu.virtio_fs_cache != "never":
        options.append("dax")
    if shares_by_9p(config):
        driver = fstype = "9p"
        # With mmap it caches nothing but pages that are mapped: what the host changes is seen.
        options = ["trans=virtio", "version=9p2000.L", "cache=mmap", f"msize={qemu.msize_9p}"]
    mount_point = f"{GUEST_ROOT}/"
    return [
        agent_pb2.Storage(driver=driver, source=TAG, fstype=fstype, options=options, mount_point=mount_point)
    ]

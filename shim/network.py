"""The pod's network in the guest: taps beside the pod's interfaces, packets from one to the other, and news of changes.

Everything of the pod's network namespace is mirrored: the interfaces that are there when the machine starts are built
into it, later ones are plugged in, and what changes is told to the guest when the kernel tells us. How the packets
cross is in `shim.crossing`.

Taps go with QEMU, who alone has them open. What is left to undo are macvtaps, and what was put on the pod's interfaces.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from hypervisor.errors import HostUnsupported, HotplugRefused, HypervisorError
from hypervisor.netns import entered, new_netns
from hypervisor.spec import Nic
from netlink.rtnl import Rtnetlink, changes, drain
from shim import crossing
from shim.background import Unbroken
from shim.errors import NetworkNotMirrored
from shim.interfaces import Snapshot, scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent_proto.client import AgentClient
    from config import Config
    from config.schema import Qemu
    from hypervisor.qemu.machine import Machine
    from shim.dan import DirectNetwork
    from shim.guest_network import GuestNetwork
    from shim.interfaces import Interface
    from shim.pod import Pod

log = structlog.get_logger()

# Every place costs the guest's boot a few milliseconds. Docker and nerdctl bring interfaces when the machine runs
# already, mostly one; as many as are taken out can be plugged in again.
NIC_PORTS = 2


class _Leaving(NamedTuple):
    """An interface that the guest has to let go of; one that it has kept stays among them."""

    nic_id: str
    mac: str
    task: asyncio.Task[None]


class PodNetwork:
    """The network of one pod. `netns` is where QEMU runs, `nics` what the machine is to have from its start, and
    `nic_ports` how many places for more.

    `remember` is told the indices of the pod's interfaces before something is put on them.
    """

    _plain = False

    def __init__(
        self,
        netns: Path | None,
        settings: Qemu,
        remember: Callable[[Path, list[int]], None],
        *,
        mirrored: bool,
        macvtap: bool = False,
    ) -> None:
        self.netns = netns
        self.nic_ports = NIC_PORTS if mirrored else 0
        self._settings = settings
        self._remember = remember
        self._macvtap = macvtap
        self._turn = asyncio.Lock()
        self._catching_up = Unbroken()
        self._joined: set[int] = set()
        self._leaving: dict[str, _Leaving] = {}
        self._guest: GuestNetwork | None = None
        self._snapshot = Snapshot()
        with ExitStack() as undo:
            if mirrored:
                with entered(netns):
                    # Before the first look, so that no change is missed.
                    self._changes = undo.enter_context(changes())
                    self._rtnl = undo.enter_context(Rtnetlink())
                self._snapshot = scan(self._rtnl)
            self._undo = undo.pop_all()
        self.nics = tuple(map(self._nic, self._snapshot.interfaces))
        if macvtap:  # they come before the machine, and do not go with it
            for interface in self._snapshot.interfaces:
                self._expect(interface)

    def owns(self, resources: ExitStack) -> None:
        """Close them with the network."""
        self._undo.push(resources.__exit__)

    def join(self) -> None:
        """Let packets cross between the pod's interfaces and the machine's, which runs now. Raises OSError."""
        for interface in self._snapshot.interfaces:
            self._join(interface)

    async def tell(self, agent: AgentClient) -> None:
        """Describe to the guest what it has not been told yet.

        Raises:
            NetworkNotMirrored: a route or rule that is to keep packets away, of which the agent cannot be told.
            RpcError: the agent refused.
        """
        if self._guest is None:
            from shim.guest_network import GuestNetwork

            self._guest = GuestNetwork(plain=self._plain)
        await self._guest.tell(agent, self._snapshot)

    async def follow(self, agent: AgentClient, machine: Machine) -> None:
        """Bring to the guest whatever changes from now on, until cancelled. The log tells what cannot be brought."""
        if not self.nic_ports:
            return
        from ttrpc import RpcError  # this module is loaded before QEMU is started, and that not

        news = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._changes, news.set)
        try:
            while True:
                await news.wait()
                news.clear()
                try:
                    async with self._turn:
                        for err in await self._catch_up(agent, machine):
                            log.error("interface_not_mirrored", reason=str(err))
                except (NetworkNotMirrored, HypervisorError, RpcError, OSError) as err:
                    log.error("network_change_not_mirrored", error=str(err))
        finally:
            loop.remove_reader(self._changes)

    async def catch_up(self, agent: AgentClient, machine: Machine) -> None:
        """Bring to the guest what has changed by now, and wait until it has it.

        Raises:
            NetworkNotMirrored, HypervisorError, OSError: an interface that cannot be brought to it.
            RpcError: the agent refused.
        """
        if self.nic_ports:
            # QEMU is told of an interface in several steps: with only the first ones taken it would refuse it later.
            await self._catching_up.run(self._caught_up(agent, machine), "catch up with the network")

    async def _caught_up(self, agent: AgentClient, machine: Machine) -> None:
        async with self._turn:
            for err in await self._catch_up(agent, machine):
                raise err

    def part(self) -> None:
        """Undo `join`: the machine is gone. Another one starts from nothing. Harmless when repeated."""
        for leaving in self._leaving.values():
            leaving.task.cancel()
        self._leaving.clear()
        for ifindex in self._joined:
            try:
                crossing.part(self._rtnl, ifindex)
            except OSError as err:
                log.warning("interface_not_parted", ifindex=ifindex, error=str(err))
        self._joined.clear()
        self._guest = None

    def close(self) -> None:
        """Let go of the namespace. Harmless when repeated."""
        self.part()
        self._undo.close()

    async def _catch_up(self, agent: AgentClient, machine: Machine) -> list[HypervisorError]:
        """One look at what there is now, and everything that follows from it; returns what keeps interfaces out."""
        drain(self._changes)
        now, failures = scan(self._rtnl), []
        for nic_id, leaving in list(self._leaving.items()):
            self._unplug(nic_id, leaving.mac, machine)  # one that the guest has kept
        here = {interface.key for interface in now.interfaces}
        for interface in self._snapshot.interfaces:
            if interface.key not in here:
                self._unplug(self._nic(interface).id, interface.link.mac, machine)
                crossing.part(self._rtnl, interface.link.ifindex)  # it may be there, with another MAC address
                self._joined.discard(interface.link.ifindex)
                self._snapshot = self._snapshot.without(interface)
                if self._guest is not None:
                    self._guest.without(interface)
        there = {interface.key for interface in self._snapshot.interfaces}
        for interface in now.interfaces:
            if interface.key not in there:
                try:
                    await self._plug(interface, machine)
                except HypervisorError as err:
                    failures.append(err)
                    now = now.without(interface)
                    continue
                log.info("interface_plugged", interface=interface.link.name, mac=interface.link.mac)
        self._snapshot = now
        await self.tell(agent)
        return failures

    async def _plug(self, interface: Interface, machine: Machine) -> None:
        self._expect(interface)
        nic = self._nic(interface)
        # With another MAC address, or that address on another interface: by it the guest knows which one is meant.
        if alike := [
            gone.task for gone in self._leaving.values() if gone.nic_id == nic.id or gone.mac == nic.mac
        ]:
            await asyncio.wait(alike)
        if any(gone.mac == nic.mac for gone in self._leaving.values()):
            raise HotplugRefused(
                f"cannot plug in interface {interface.link.name}: the guest has not let go of an earlier one with the "
                f"MAC address {nic.mac}; give it another one, or change the network once more to try again"
            )
        try:
            await machine.plug_nic(nic)
        except HotplugRefused:
            if not self._leaving:
                raise
            # They leave places free.
            await asyncio.wait([gone.task for gone in self._leaving.values()])
            await machine.plug_nic(nic)
        try:
            self._join(interface)
        except (HypervisorError, OSError):
            try:
                await machine.unplug_nic(nic.id)
            finally:
                crossing.part(self._rtnl, interface.link.ifindex)
            raise

    def _unplug(self, nic_id: str, mac: str, machine: Machine) -> None:
        """Begin to take an interface out. The guest may take its time to let go of it, and nobody waits for that who
        does not need its place."""
        if nic_id not in self._leaving or self._leaving[nic_id].task.done():
            unplugging = self._unplugged(nic_id, machine)
            task = asyncio.create_task(unplugging, name=f"unplug {nic_id}")
            self._leaving[nic_id] = _Leaving(nic_id, mac, task)

    async def _unplugged(self, nic_id: str, machine: Machine) -> None:
        try:
            await machine.unplug_nic(nic_id)
        except HypervisorError as err:  # tried again with the next change
            log.error("interface_not_unplugged", interface=nic_id, reason=str(err))
        else:
            self._leaving.pop(nic_id, None)

    def _nic(self, interface: Interface) -> Nic:
        return Nic(
            id=f"nic{interface.link.ifindex}",
            mac=interface.link.mac,
            tap=interface.tap,
            queues=self._settings.network_queues,
            vhost=not self._settings.disable_vhost_net,
            parent=interface.link.ifindex if self._macvtap else 0,
        )

    def _expect(self, interface: Interface) -> None:
        """Something is about to be put on the interface, or beside it, that has to be undone."""
        if interface.link.ifindex not in self._joined:
            self._joined.add(interface.link.ifindex)
            assert self.netns is not None
            self._remember(self.netns, sorted(self._joined))

    def _join(self, interface: Interface) -> None:
        self._expect(interface)
        crossing.join(self._rtnl, interface.link, self._settings, macvtap=self._macvtap)


class DirectPodNetwork(PodNetwork):
    """A network that is as a file describes it (`shim.dan`). Packets are moved by others; nothing changes."""

    _plain = True  # the file has no more words than the agents' messages

    def __init__(self, netns: Path | None, settings: Qemu, described: DirectNetwork) -> None:
        from shim import dan

        super().__init__(netns, settings, lambda netns, ifindexes: None, mirrored=False)
        self._snapshot = dan.snapshot_of(described)
        self.nics = dan.nics_of(described, vhost=not settings.disable_vhost_net)

    def join(self) -> None:
        """Done by others."""


def network_of(
    pod: Pod, config: Config, sandbox_id: str, remember: Callable[[Path, list[int]], None]
) -> PodNetwork:
    """The pod's network as the configuration wants it. A pod that was given no namespace gets one of its own.

    Raises:
        HostUnsupported: a namespace that cannot be entered or made.
        InvalidRequest: a description of a direct network that cannot be used.
        NetworkNotMirrored, OSError: what is in it cannot be brought to the guest.
    """
    direct = None
    if config.runtime.dan_conf:
        from shim import dan

        direct = dan.read(config.runtime.dan_conf, sandbox_id)
    try:
        return _network_of(pod, config, direct, remember)
    except OSError as err:  # of a system call: the host lacks something
        why = f"the virtual machine did not start: the pod's network: {err.strerror}"
        raise OSError(err.errno, why) from err


def _network_of(
    pod: Pod,
    config: Config,
    direct: DirectNetwork | None,
    remember: Callable[[Path, list[int]], None],
) -> PodNetwork:
    netns = Path(direct.netns) if direct is not None and direct.netns else pod.netns
    with ExitStack() as undo:
        if netns is None and not pod.host_network and not config.runtime.disable_new_netns:
            fd = new_netns()
            undo.callback(os.close, fd)
            netns = Path(f"/proc/self/fd/{fd}")
        if direct is not None:
            network: PodNetwork = DirectPodNetwork(netns, config.hypervisor, direct)
            network.owns(undo.pop_all())
            return network
        mirrored = netns is not None and config.runtime.internetworking_model != "none"
        if pod.host_network:
            log.warning("host_network_not_mirrored", reason="a guest has no part in the host's own network")
        macvtap = mirrored and config.runtime.internetworking_model == "macvtap"
        network = PodNetwork(netns, config.hypervisor, remember, mirrored=mirrored, macvtap=macvtap)
        network.owns(undo.pop_all())
    return network


def forget(netns: str, ifindexes: Iterable[int]) -> None:
    """Undo what a network has left on the pod's interfaces, in a later process. A namespace that is gone is fine.

    Raises OSError.
    """
    try:
        with entered(Path(netns)), Rtnetlink() as rtnetlink:
            for ifindex in ifindexes:
                crossing.part(rtnetlink, ifindex)
    except HostUnsupported:
        return

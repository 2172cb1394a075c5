"""What one guest has been told of its pod's network, and how it is told what is new. Loaded when its agent answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from agent_proto.gen import agent_pb2
from shim import routing
from shim.errors import NetworkNotMirrored
from shim.interfaces import Snapshot, interface_to_proto
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from shim.interfaces import Interface

log = structlog.get_logger()

# How many names are in one line of the log.
_NAMES = 20


class GuestNetwork:
    """The network of one machine's guest, in which there is nothing at first. With `plain` the agent's own messages say
    all that there is to say."""

    def __init__(self, *, plain: bool) -> None:
        self._plain = plain
        self._told = Snapshot()
        # Whether the agent may have our extension, and whether the network was told by it: then that goes on, so that
        # what has gone here goes there.
        self._extended = not plain
        self._by_extension = False
        self._named: dict[str, list[str]] = {}

    def without(self, interface: Interface) -> None:
        """An interface has been unplugged, and what was over it with it."""
        self._told = self._told.without(interface)

    async def tell(self, agent: AgentClient, snapshot: Snapshot) -> None:
        """Describe to the guest what it has not been told yet.

        Raises:
            NetworkNotMirrored: a route or rule that is to keep packets away, of which the agent cannot be told.
            RpcError: the agent refused.
        """
        for interface in snapshot.interfaces:
            if interface not in self._told.interfaces:
                request = agent_pb2.UpdateInterfaceRequest(interface=interface_to_proto(interface))
                await agent.update_interface(request)
        if snapshot != self._told:
            routing.refuse_half_told(snapshot)
            self._name(routing.nobodys(snapshot), "they have attributes that no guest is told of")
            if not await self._mirror(agent, snapshot):
                await self._tell_apart(agent, snapshot)
        self._told = snapshot

    async def _mirror(self, agent: AgentClient, snapshot: Snapshot) -> bool:
        """Tell routes, rules and neighbours by our extension, if that is needed; returns whether that was done."""
        beyond = [] if self._plain else routing.beyond_words(snapshot, self._told)
        if not beyond and not self._by_extension:
            return False
        try:
            if self._extended:
                await agent.mirror_network(routing.mirror_to_proto(snapshot))
                self._by_extension = True
                return True
        except RpcError as err:
            if err.code is not Code.UNIMPLEMENTED:
                raise
            self._extended = False
        if kept_away := routing.restrictions(snapshot):
            raise NetworkNotMirrored(
                f"the guest's agent cannot be told of {', '.join(kept_away[:_NAMES])} of the pod, which is to keep "
                "packets away: without it the guest reaches more than the pod may; use kata-py's guest, or remove it"
            )
        self._name(beyond, "the guest's agent has no words for them")
        return False

    async def _tell_apart(self, agent: AgentClient, snapshot: Snapshot) -> None:
        """By the agent's own messages. With an interface that is set anew go its neighbours and routes."""
        told = self._told
        changed = snapshot.interfaces != told.interfaces
        if snapshot.neighbours and (changed or snapshot.neighbours != told.neighbours):
            neighbours = routing.neighbours_to_proto(snapshot)
            await agent.add_arp_neighbors(agent_pb2.AddARPNeighborsRequest(neighbors=neighbours))
        routes = routing.routes_to_proto(snapshot)
        if changed or routes != routing.routes_to_proto(told):
            await agent.update_routes(agent_pb2.UpdateRoutesRequest(routes=routes))

    def _name(self, names: list[str], reason: str) -> None:
        """Once, until they are others: every change of the network comes here."""
        if names and names != self._named.get(reason):
            log.warning("network_partly_mirrored", not_brought=names[:_NAMES], reason=reason)
        self._named[reason] = names

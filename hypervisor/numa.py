"""Which NUMA nodes a guest gets, and which of the host's their memory comes from.

Linux tells of the host's nodes in /sys/devices/system/node (Documentation/ABI/stable/sysfs-devices-node).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from config.numa import nodes_of
from hypervisor.errors import HostUnsupported
from hypervisor.spec import NumaNode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.host import Host

_NODES = "sys/devices/system/node"
# Of ACPI. What is no farther than a node is from itself, Linux takes for a table that is wrong.
_NEAR, _NEXT = 10, 11


def guest_nodes(mapping: Sequence[Sequence[int]], host: Host) -> tuple[NumaNode, ...]:
    """A node for each entry, whose memory comes from those nodes of the host; without entries one for each node of the
    host, and none when it has no more than one.

    Raises HostUnsupported when the host has no such node with memory.
    """
    there = host_nodes(host)
    if not mapping:
        mapping = [(node,) for node in there] if len(there) > 1 else []
    for node in sorted({node for nodes in mapping for node in nodes}):
        if node not in there:
            has = ", ".join(map(str, there)) or "none"
            raise HostUnsupported(
                f"guest memory cannot come from NUMA node {node} of this host: its nodes with memory are {has}; "
                "correct numa_mapping"
            )
    rows = {node: _distances(node, host) for node in there}
    return tuple(
        NumaNode(
            host_nodes=tuple(nodes),
            distances=tuple(
                _NEAR if index == other else _between(rows, nodes, others)
                for other, others in enumerate(mapping)
            ),
        )
        for index, nodes in enumerate(mapping)
    )


def host_nodes(host: Host) -> tuple[int, ...]:
    """The host's nodes that have memory; none when its kernel does not know of nodes."""
    try:
        return nodes_of((host.root / _NODES / "has_memory").read_text().strip())
    except (OSError, ValueError):
        return ()


def _distances(node: int, host: Host) -> tuple[int, ...]:
    """How far the host's nodes are from this one, in the order of those that are online."""
    try:
        words = (host.root / _NODES / f"node{node}/distance").read_text().split()
        online = nodes_of((host.root / _NODES / "online").read_text().strip())
        far = dict(zip(online, map(int, words), strict=True))
    except (OSError, ValueError):
        return ()
    return tuple(far.get(other, 0) for other in range(max(far) + 1))


def _between(rows: dict[int, tuple[int, ...]], ours: Sequence[int], others: Sequence[int]) -> int:
    """The farthest way between two groups of the host's nodes."""
    ways = [rows[a][b] for a in ours for b in others if b < len(rows[a])]
    return min(max([_NEXT, *ways]), 254)

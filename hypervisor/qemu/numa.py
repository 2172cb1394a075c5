"""A guest with NUMA nodes: each has memory of its own and a share of the processors, and is so far from the others.

Every processor is a socket then, since Linux does not expect one that lies in two nodes. Processors go round the nodes,
so that those that are there at boot are as evenly divided as all that there may be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hypervisor.errors import InvalidSpec
from hypervisor.qemu import args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor.arch import Arch
    from hypervisor.qemu.args import Nodes
    from hypervisor.spec import VmSpec

# Linux takes memory in blocks of this size; smaller guests have to do with whole huge pages.
_BLOCK_MIB, _HUGE_PAGE_MIB = 128, 2
_LEAST_NODE_MIB = 32  # less than this Linux may give back to another node


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NumaNodeSwitch(args.Props):
    """`-numa node`."""

    nodeid: int
    cpus: Nodes
    memdev: str

    def argv(self) -> list[str]:
        return ["-numa", args.join_props("node", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NumaDistance(args.Props):
    """`-numa dist`: how far `dst` is, seen from `src`."""

    src: int
    dst: int
    val: int

    def argv(self) -> list[str]:
        return ["-numa", args.join_props("dist", self)]


def switches(
    spec: VmSpec, arch: Arch, processors: int, backend: Callable[[str, str], Any]
) -> Iterator[args.Switch]:
    """The nodes; `backend` makes the memory object for a name and a size. Raises InvalidSpec."""
    if not arch.numa:
        raise InvalidSpec(f"{arch.name} guests have no NUMA nodes; remove enable_numa and numa_mapping")
    sizes = divided(spec.memory_mib, len(spec.numa))
    for index, (node, size) in enumerate(zip(spec.numa, sizes, strict=True)):
        memory = backend(f"mem{index}", f"{size}M")
        if node.host_nodes:
            memory = replace(memory, host_nodes=node.host_nodes, policy="bind")
        yield memory
        cpus = tuple(range(index, processors, len(spec.numa)))
        yield NumaNodeSwitch(nodeid=index, cpus=cpus, memdev=f"mem{index}")
    for index, node in enumerate(spec.numa):
        for other, distance in enumerate(node.distances):
            if other != index:
                yield NumaDistance(src=index, dst=other, val=distance)


def divided(memory_mib: int, nodes: int) -> list[int]:
    """The memory of each node in MiB; the first has what does not divide. Raises InvalidSpec when it is too little."""
    part = memory_mib // nodes
    block = _BLOCK_MIB if part >= _BLOCK_MIB else _HUGE_PAGE_MIB
    part = part // block * block
    if part < _LEAST_NODE_MIB:
        raise InvalidSpec(
            f"{memory_mib} MiB are too little for {nodes} NUMA nodes of {_LEAST_NODE_MIB} MiB or more; "
            "raise default_memory, or name fewer nodes in numa_mapping"
        )
    return [memory_mib - part * (nodes - 1), *[part] * (nodes - 1)]

"""The size of a machine that gets all of its pod's resources at boot: `static_sandbox_resource_mgmt`."""

import math
from typing import NamedTuple

from config.schema import Config
from config.schema.key import U32_MAX
from config.tree import Table, Tree

ORIGIN = "CRI sizing"
_MIB = 2**20


class PodResources(NamedTuple):
    """The limits of a pod: microseconds of CPU time in each period of so many, and bytes. 0 or less is no limit."""

    cpu_quota: int = 0
    cpu_period: int = 0
    memory_bytes: int = 0


def size(tree: Tree, resources: PodResources, config: Config) -> None:
    """Lay the pod's size over the tree that `config` was decoded from.

    CPUs become whole ones and memory an even number of MiB, both rounded up, and what the guest itself needs is added
    (`overhead_vcpus`, `overhead_memory`). A resource without a limit keeps its default. There is no growing later.
    """
    qemu: Table = {"default_maxvcpus": math.ceil(config.hypervisor.default_vcpus)}
    if resources.cpu_quota > 0 and resources.cpu_period > 0:
        wanted = config.hypervisor.overhead_vcpus + -(-resources.cpu_quota // resources.cpu_period)
        vcpus = min(max(1.0, wanted), U32_MAX)
        qemu = {"default_vcpus": vcpus, "default_maxvcpus": math.ceil(vcpus)}
    if resources.memory_bytes > 0:
        # Any number may stand for "no limit"; what the host does not have is cut off later.
        needed = config.hypervisor.overhead_memory + 2 * -(-resources.memory_bytes // (2 * _MIB))
        mib = min(needed, U32_MAX)
        qemu |= {"default_memory": mib, "default_maxmemory": mib}
    tree.merge(ORIGIN, {"hypervisor": {"qemu": qemu}})

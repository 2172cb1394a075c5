"""Loads what a daemon imports late or only in some cases, while its files are certain to be there.

Pods outlive installations: kata-py's files may be replaced, or removed, while a daemon runs, and an import would then
find another version's module or none. What the standard library imports late is the distribution's and stays.
"""

from __future__ import annotations

import importlib

LATE = (
    "config.annotations",
    "config.confidential",
    "config.extensions",
    "config.guest_files",
    "config.initdata",
    "config.numa",
    "config.show",
    "config.verity",
    "shim.vhost_user_store",
    # `Pids` while execs run.
    "shim.api.gen.runc_options_pb2",
    # The machine, which waits for `StartSandbox` when the pod comes through the Sandbox API.
    "agent_proto.client",
    "hypervisor.arch.aarch64",
    "hypervisor.arch.s390x",
    "hypervisor.confidential",
    "hypervisor.protection",
    "hypervisor.numa",
    "hypervisor.qemu.capabilities",
    "hypervisor.qemu.confidential",
    "hypervisor.qemu.disk",
    "hypervisor.qemu.disk_places",
    "hypervisor.qemu.dump",
    "hypervisor.qemu.events",
    "hypervisor.extension",
    "hypervisor.macvtap",
    "hypervisor.qemu.extras",
    "hypervisor.qemu.memory",
    "hypervisor.qemu.nic",
    "hypervisor.locked_memory",
    "hypervisor.qemu.numa",
    "hypervisor.qemu.options",
    "hypervisor.qemu.ports",
    "hypervisor.qemu.rare_args",
    "hypervisor.qemu.resize",
    "hypervisor.rootless",
    "hypervisor.qemu.vfio",
    "hypervisor.qemu.vhost_user_disk",
    "hypervisor.verity",
    "hypervisor.vfio",
    "hypervisor.vsock.user",
    "hypervisor.vsock.vhost",
    "qemu.qmp",
    "shim.agent",
    "shim.api.gen.pod_pb2",
    "shim.confidential",
    "shim.dan",
    "shim.host_cgroup",
    "shim.disks",
    "shim.empty_dirs",
    "shim.ext4_images",
    "shim.guest_network",
    "shim.guest_swap",
    "shim.host_sockets",
    "shim.kubelet",
    "shim.layers",
    "shim.loop",
    "shim.passthrough",
    "shim.port_forward",
    "shim.mirror",
)

# For descriptions of devices that come with containers. It takes longer than all of the above, so only daemons
# import it that plug devices in.
FOR_HOST_DEVICES = ("yaml",)


def load(names: tuple[str, ...] = LATE) -> None:
    """Import all of it: a few milliseconds, to be spent while the guest's kernel boots."""
    for name in names:
        importlib.import_module(name)

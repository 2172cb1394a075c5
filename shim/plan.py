"""What a sandbox's machine is to be: the configuration of its pod, and what depends on the host.

Nothing is started, and nothing on the host is changed; `shim.vmspec` then says what follows from all of it. This runs
before QEMU does, so that what only some pods need is imported where it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from config import load
from hypervisor.accel import choose_accel, choose_vsock
from hypervisor.errors import HostUnsupported
from hypervisor.host import Host
from shim.agent import ready_port
from shim.bootstrap import config_path
from shim.vmspec import guest_arch, vm_spec

if TYPE_CHECKING:
    from config import Config, LoadedConfig, PodResources
    from hypervisor.spec import NumaNode, VmSpec
    from shim.network import PodNetwork
    from shim.pod import Pod

log = structlog.get_logger()


def load_config(options: bytes, pod: Pod, machine_type: str = "") -> LoadedConfig:
    """The configuration that the runtime options name, or the default one, with what the pod's annotations and limits
    change, and what its image does if that is for another `machine_type`; its warnings are logged.

    Raises:
        ConfigError: every problem, with file or annotation, and key.
    """
    path = config_path(options)
    if path is None and options:
        log.warning(
            "runtime_options_ignored",
            reason="they are not runtimeoptions.v1.Options, the type with ConfigPath",
        )
    loaded = load(
        Path(path) if path else None,
        annotations=pod.annotations,
        resources=pod.resources,
        machine_type=machine_type,
    )
    for warning in loaded.warnings:
        log.warning("configuration_warning", file=str(loaded.path or "built-in defaults"), warning=warning)
    return loaded


def plan(
    config: Config,
    sandbox_id: str,
    *,
    exported: Path,
    network: PodNetwork | None = None,
    host: Host | None = None,
    limits: PodResources | None = None,
) -> VmSpec:
    """Decide what depends on the host (default: this one), and say so once where the second best is taken; `limits`
    are the pod's.

    Raises:
        HostUnsupported, ProgramNotFound: an explicit setting cannot work here.
    """
    qemu, arch, host, protection = config.hypervisor, guest_arch(config), host or Host(), None
    if qemu.confidential_guest:
        from hypervisor import confidential as choose
        from shim.confidential import protection as protection_of

        accel, vsock = choose.choose_accel(arch, host), choose.choose_vsock(host)
        protection = protection_of(qemu, arch, host)
    else:
        accel = choose_accel(qemu.accel, guest_arch=arch, host=host)
        vsock = choose_vsock(qemu.vsock, host=host)
    if accel.reason:
        log.warning("accel_fallback", accel=accel.value, reason=accel.reason)
    if vsock.reason:
        log.info("vsock_fallback", vsock=vsock.value, reason=vsock.reason)
    has_disks = (
        qemu.image
        or qemu.guest_extension_images
        or qemu.initdata
        or not qemu.disable_block_device_use  # and with that, later ones
    )
    io_uring = not has_disks or host.has_io_uring()
    if not io_uring and qemu.block_device_aio == "io_uring":
        log.info("io_uring_fallback", aio="threads", reason="this host does not let programs use io_uring")
    user = None
    if qemu.rootless:
        from hypervisor.rootless import choose_user

        user = choose_user(sandbox_id, accel.value, root=host.root)
    if qemu.selinux_label and not qemu.disable_selinux and not host.has_selinux():
        raise HostUnsupported(
            f"QEMU cannot run as {qemu.selinux_label}: this host has no SELinux; "
            "remove selinux_label or set disable_selinux"
        )
    numa: tuple[NumaNode, ...] = ()
    if qemu.enable_numa or qemu.numa_mapping:
        from config.numa import nodes_of
        from hypervisor.numa import guest_nodes

        numa = guest_nodes([nodes_of(entry) for entry in qemu.numa_mapping], host)
    return vm_spec(
        config,
        sandbox_id,
        user=user,
        numa=numa,
        accel=accel.value,
        vsock=vsock.value,
        ready_vport=ready_port(vsock.value),
        virtiofsd=Path(qemu.virtio_fs_daemon) if qemu.shared_fs != "none" else None,
        exported=exported,
        netns=network.netns if network else None,
        nics=network.nics if network else (),
        nic_ports=network.nic_ports if network else 0,
        tsc_khz=host.tsc_khz(),
        image_bytes=Path(qemu.image).stat().st_size if qemu.image else 0,
        io_uring=io_uring,
        protection=protection,
        limits=limits,
    )

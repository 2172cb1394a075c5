"""Configuration and bundle in, `VmSpec` out. Pure, so that what a pod gets can be read off and tested in one place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.arch import arch_named, arch_of_machine
from hypervisor.spec import Export, QmpTimeouts, Share, VmSpec
from shim import paths
from shim.agent import READY_PORT
from shim.share import TAG

if TYPE_CHECKING:
    from typing import TypedDict

    from config import Config, PodResources
    from config.schema import MemAgent, Qemu
    from hypervisor.extension import Extension
    from hypervisor.protection import Protection
    from hypervisor.rootless import User
    from hypervisor.spec import Accel, BlockAio, Nic, NumaNode, RootfsDriver, VsockKind
    from hypervisor.verity import Verity
    from hypervisor.vfio import PortKind

    class Growth(TypedDict):
        memory_slots: int
        max_memory_mib: int
        virtio_mem: bool

    class HostDeviceOptions(TypedDict):
        host_device_port: PortKind
        host_device_places: int

    class DiskOptions(TypedDict):
        disk_aio: BlockAio
        disk_cache_direct: bool | None
        disk_cache_no_flush: bool | None
        disk_queue_size: int
        disk_queues: int
        disk_logical_sector_bytes: int | None
        disk_physical_sector_bytes: int | None
        disk_places: bool
        vhost_user_reconnect_s: int
        scsi: bool
        spare_iothreads: int


# QEMU's emulated processors address 1 TiB, in which devices have their place as well.
_TCG_MEMORY_MIB = 512 << 10
_USUAL_ENTROPY = "/dev/urandom"
_DEBUG_CONSOLE_PORT = 1026
# What agents have without being told.
_AGENT_PORT = 1024
_CDH_API_TIMEOUT_MS = 50000


def vm_spec(
    config: Config,
    sandbox_id: str,
    *,
    accel: Accel,
    vsock: VsockKind,
    ready_vport: int = READY_PORT,
    virtiofsd: Path | None,
    exported: Path,
    netns: Path | None,
    nics: tuple[Nic, ...] = (),
    nic_ports: int = 0,
    tsc_khz: int | None,
    image_bytes: int = 0,
    io_uring: bool = True,
    protection: Protection | None = None,
    user: User | None = None,
    numa: tuple[NumaNode, ...] = (),
    limits: PodResources | None = None,
) -> VmSpec:
    """The machine of one sandbox. What depends on the host has been decided by the caller: `ready_vport` is the host's
    port that the guest's agent calls, `virtiofsd` is None when nothing is shared, `image_bytes` is the size of the
    configured image, `io_uring` whether the host lets programs use that, `protection` what the host hides a
    confidential guest with, `numa` what the host's nodes make of the configured ones, and `limits` the pod's.

    Raises InvalidSpec for settings that have no machine.
    """
    qemu = config.hypervisor
    flash = (qemu.firmware, qemu.firmware_volume) if qemu.firmware_volume else qemu.pflashes
    shares: tuple[Share, ...] = ()
    exports: tuple[Export, ...] = ()
    if virtiofsd is not None and shares_by_9p(config):
        exports = (Export(tag=TAG, directory=exported),)
    elif virtiofsd is not None:
        shares = (
            Share(
                tag=TAG,
                directory=exported,
                daemon=virtiofsd,
                cache="never" if qemu.virtio_fs_cache == "none" else qemu.virtio_fs_cache,
                queue_size=qemu.virtio_fs_queue_size or 1024,
                dax_mib=qemu.virtio_fs_cache_size,
                extra_args=tuple(qemu.virtio_fs_extra_args),
            ),
        )
    return VmSpec(
        name=f"sandbox-{sandbox_id}",
        run_dir=Path(paths.run_dir(sandbox_id)),
        qemu_path=Path(qemu.path),
        kernel=Path(qemu.kernel),
        initrd=Path(qemu.initrd) if qemu.initrd else None,
        image=Path(qemu.image) if qemu.image else None,
        image_initrd=Path(qemu.image_initrd) if qemu.image_initrd else None,
        rootfs_type=qemu.rootfs_type,
        rootfs_driver=_rootfs_driver(qemu),
        image_bytes=image_bytes,
        verity=_verity(qemu),
        firmware=Path(qemu.firmware) if qemu.firmware and not flash else None,
        pflash=tuple(Path(name) for name in flash),
        kernel_params=" ".join(word for word in (agent_words(config), qemu.kernel_params) if word),
        protection=protection,
        initdata=Path(paths.run_dir(sandbox_id), paths.INITDATA_FILE) if qemu.initdata else None,
        arch=guest_arch(config),
        accel=accel,
        machine_type=qemu.machine_type,
        machine_accelerators=qemu.machine_accelerators,
        cpu_features=qemu.cpu_features,
        tsc_khz=tsc_khz,
        vcpus=-int(-qemu.default_vcpus // 1),
        max_vcpus=_most_vcpus(qemu, accel, limits),
        memory_mib=qemu.default_memory,
        **_growth(config, accel),
        memory_prealloc=qemu.enable_mem_prealloc,
        hugepages=qemu.enable_hugepages and qemu.hugepage_type == "hugetlbfs",
        numa=numa,
        memory_dir=Path(qemu.file_mem_backend) if qemu.file_mem_backend else None,
        shares=shares,
        exports=exports,
        vsock=vsock,
        log_vport=config.agent.log_port if wants_agent_log(config) else None,
        ready_vport=ready_vport,
        netns=netns,
        user=user,
        selinux_label="" if qemu.disable_selinux else qemu.selinux_label,
        nics=nics,
        nic_ports=nic_ports,
        iommu=qemu.enable_iommu,
        iommu_platform=qemu.enable_iommu_platform or (protection is not None and protection.bounces),
        nested_virtualization=not qemu.disable_nested_virtualization,
        iothread=qemu.enable_iothreads,
        **_disks(qemu, io_uring=io_uring),
        extensions=_extensions(qemu),
        balloon=qemu.reclaim_guest_freed_memory,
        entropy_source=Path(qemu.entropy_source) if qemu.entropy_source != _USUAL_ENTROPY else None,
        pcie_root_ports=qemu.pcie_root_port,
        pcie_switch_ports=qemu.pcie_switch_port,
        **_host_devices(config),
        extra_monitor=(qemu.extra_monitor_socket or None) if qemu.enable_debug else None,
        seccomp_sandbox=qemu.seccomp_sandbox,
        dump_dir=Path(qemu.guest_memory_dump_path) / sandbox_id if qemu.guest_memory_dump_path else None,
        dump_paging=qemu.guest_memory_dump_paging,
        debug=qemu.enable_debug,
        qmp=QmpTimeouts(
            read_timeout_s=qemu.qmp_read_timeout_ms / 1000,
            connect_timeout_s=qemu.qmp_connect_timeout_ms / 1000,
            retry_pause_s=qemu.qmp_retry_pause_ms / 1000,
        ),
    )


def guest_arch(config: Config) -> str:
    """The guest's architecture as `uname -m` says it, by the type of machine. Raises InvalidSpec."""
    return arch_of_machine(config.hypervisor.machine_type)


def shares_by_9p(config: Config) -> bool:
    """Whether the guest has another byte order than the host, with which virtiofs does not work."""
    return arch_named(guest_arch(config)).byte_order != sys.byteorder


def _host_devices(config: Config) -> HostDeviceOptions:
    """Where they go. One that is plugged in later has a port also when no number of these is configured."""
    qemu = config.hypervisor
    kinds = (kind for kind in (qemu.hot_plug_vfio, qemu.cold_plug_vfio) if kind != "no-port")
    plugs_in = qemu.hot_plug_vfio != "no-port" and arch_named(guest_arch(config)).pcie_ports
    return {"host_device_port": next(kinds, "root-port"), "host_device_places": int(plugs_in)}


def _verity(qemu: Qemu) -> Verity | None:
    if not qemu.kernel_verity_params:
        return None
    from hypervisor.verity import Verity

    return Verity.parse(qemu.kernel_verity_params)


def _most_vcpus(qemu: Qemu, accel: Accel, limits: PodResources | None) -> int:
    """Room for processors. Under TCG the guest pays for those that are not there yet, with slower code: there is room
    for what the pod's limits ask for and no more."""
    if accel == "kvm":
        return qemu.default_maxvcpus
    if limits is None or limits.cpu_quota <= 0 or limits.cpu_period <= 0:
        return 0
    return min(qemu.default_maxvcpus, -(-limits.cpu_quota // limits.cpu_period))


def _growth(config: Config, accel: Accel) -> Growth:
    """Room for memory, where it can be added while the machine runs: as modules, or through virtio-mem."""
    qemu = config.hypervisor
    dimms = arch_named(guest_arch(config)).dimms and not config.runtime.static_sandbox_resource_mgmt
    if not (dimms or qemu.enable_virtio_mem) or qemu.confidential_guest:
        return {"memory_slots": 0, "max_memory_mib": 0, "virtio_mem": False}
    most = qemu.default_maxmemory + qemu.memory_offset
    return {
        "memory_slots": qemu.memory_slots,
        "max_memory_mib": min(most, _TCG_MEMORY_MIB) if accel == "tcg" else most,
        "virtio_mem": qemu.enable_virtio_mem,
    }


def _disks(qemu: Qemu, *, io_uring: bool) -> DiskOptions:
    aio = "threads" if qemu.block_device_aio == "io_uring" and not io_uring else qemu.block_device_aio
    cached = qemu.block_device_cache_set
    comes_later = not qemu.disable_block_device_use
    virtio = comes_later and qemu.block_device_driver.startswith("virtio-blk-")
    spare = virtio and qemu.enable_iothreads
    return {
        "disk_aio": aio,
        # QEMU has native I/O only past the page cache.
        "disk_cache_direct": True if aio == "native" else qemu.block_device_cache_direct if cached else None,
        "disk_cache_no_flush": qemu.block_device_cache_noflush if cached else None,
        "disk_queue_size": qemu.queue_size,
        "disk_queues": qemu.num_queues,
        "disk_logical_sector_bytes": qemu.block_device_logical_sector_size or None,
        "disk_physical_sector_bytes": qemu.block_device_physical_sector_size or None,
        # Disks that other programs serve are virtio disks, whatever the others are.
        "disk_places": virtio or qemu.enable_vhost_user_store,
        "vhost_user_reconnect_s": qemu.vhost_user_reconnect_timeout_sec,
        "scsi": comes_later and qemu.block_device_driver == "virtio-scsi",
        "spare_iothreads": qemu.indep_iothreads if spare else 0,
    }


def _extensions(qemu: Qemu) -> tuple[Extension, ...]:
    if not qemu.guest_extension_images:
        return ()
    from hypervisor.extension import Extension

    return tuple(
        Extension(name=image.name, image=Path(image.path), verity_params=image.verity_params)
        for image in qemu.guest_extension_images
    )


def _rootfs_driver(qemu: Qemu) -> RootfsDriver:
    wanted = qemu.image and qemu.vm_rootfs_driver == "virtio-pmem" and not qemu.disable_image_nvdimm
    return "nvdimm" if wanted else "virtio-blk"


def wants_agent_log(config: Config) -> bool:
    """Whether the agent's log is brought to the host: with debugging of the machine (as Kata has it) or the agent, or
    when more than usual is wanted of it."""
    agent = config.agent
    return config.hypervisor.enable_debug or agent.enable_debug or agent.log_level in ("trace", "debug")


def agent_words(config: Config) -> str:
    """The kernel words by which a Kata agent takes its settings, in a stable order."""
    agent = config.agent
    words = []
    if agent.enable_debug:
        words.append("agent.log=debug")
    elif agent.log_level != "info":
        words.append(f"agent.log={agent.log_level}")
    if agent.server_port != _AGENT_PORT:
        words.append(f"agent.server_addr=vsock://-1:{agent.server_port}")
    if agent.enable_tracing:
        words.append("agent.trace=true")
    if agent.container_pipe_size > 0:
        words.append(f"agent.container_pipe_size={agent.container_pipe_size}")
    if agent.launch_process_timeout > 0:
        words.append(f"agent.launch_process_timeout={agent.launch_process_timeout}")
    if agent.cdh_api_timeout_ms not in (0, _CDH_API_TIMEOUT_MS):
        words.append(f"agent.cdh_api_timeout={-(-agent.cdh_api_timeout_ms // 1000)}")
    if agent.debug_console_enabled:
        words += ["agent.debug_console", f"agent.debug_console_vport={_DEBUG_CONSOLE_PORT}"]
    if agent.visible_cdi_devices:
        words.append("agent.visible_cdi_devices=true")
    if agent.mem_agent.mem_agent_enable or agent.mem_agent.enable:
        words += _mem_agent_words(agent.mem_agent)
    return " ".join(words)


def _mem_agent_words(settings: MemAgent) -> list[str]:
    """The agent reads the other words only after the one that enables it, so that one comes first."""
    words = ["psi=1", "agent.mem_agent_enable=1"]
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if name.startswith(("memcg_", "compact_")) and value is not None:
            words.append(f"agent.mem_agent_{name}={int(value)}")
    return words

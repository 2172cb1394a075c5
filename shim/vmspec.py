"""Configuration and bundle in, `VmSpec` out. Pure, so that what a pod gets can be read off and tested in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.spec import QmpTimeouts, Share, VmSpec
from shim import paths
from shim.agent import READY_PORT
from shim.share import TAG

if TYPE_CHECKING:
    from config import Config
    from hypervisor.spec import Accel, VsockKind


def vm_spec(
    config: Config,
    sandbox_id: str,
    *,
    accel: Accel,
    vsock: VsockKind,
    virtiofsd: Path | None,
    exported: Path,
    netns: Path | None,
    tsc_khz: int | None,
) -> VmSpec:
    """The machine of one sandbox. What depends on the host has been decided by the caller; `virtiofsd` is None
    when nothing is shared."""
    qemu = config.hypervisor
    shares: tuple[Share, ...] = ()
    if virtiofsd is not None:
        shares = (
            Share(
                tag=TAG,
                directory=exported,
                daemon=virtiofsd,
                cache="never" if qemu.virtio_fs_cache == "none" else qemu.virtio_fs_cache,
                queue_size=qemu.virtio_fs_queue_size or 1024,
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
        rootfs_type=qemu.rootfs_type,
        firmware=Path(qemu.firmware) if qemu.firmware else None,
        kernel_params=" ".join(word for word in (agent_words(config), qemu.kernel_params) if word),
        accel=accel,
        machine_type=qemu.machine_type,
        machine_accelerators=qemu.machine_accelerators,
        cpu_features=qemu.cpu_features,
        tsc_khz=tsc_khz,
        vcpus=-int(-qemu.default_vcpus // 1),
        memory_mib=qemu.default_memory,
        shares=shares,
        vsock=vsock,
        log_vport=config.agent.log_port if wants_agent_log(config) else None,
        ready_vport=READY_PORT,
        netns=netns,
        seccomp_sandbox=qemu.seccomp_sandbox,
        debug=qemu.enable_debug,
        qmp=QmpTimeouts(
            read_timeout_s=qemu.qmp_read_timeout_ms / 1000,
            connect_timeout_s=qemu.qmp_connect_timeout_ms / 1000,
            retry_pause_s=qemu.qmp_retry_pause_ms / 1000,
        ),
    )


def wants_agent_log(config: Config) -> bool:
    """Whether the agent's log is brought to the host: with debugging of the machine (as Kata has it) or the agent."""
    return config.hypervisor.enable_debug or config.agent.enable_debug


def agent_words(config: Config) -> str:
    """The kernel words by which a Kata agent takes its settings, in a stable order."""
    agent = config.agent
    words = []
    if agent.enable_debug:
        words.append("agent.log=debug")
    if agent.container_pipe_size > 0:
        words.append(f"agent.container_pipe_size={agent.container_pipe_size}")
    return " ".join(words)

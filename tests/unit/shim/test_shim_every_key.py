"""Every key of the schema, with the proof of what it does: a difference that it makes to what the shim does, or the
line that says why it makes none. A key without a row here is a failure, and so is a row without a difference.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from config import ConfigError, HostLimits, load
from config.schema import SECTIONS, Section, info
from tests.support.fake_agent import FakeAgent
from tests.unit.config.config_site import HOST, VERITY, Site
from tests.unit.shim.key_effects import done_by
from tests.unit.shim.test_shim_confidential import INITDATA
from ttrpc import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

QEMU, AGENT, MEM_AGENT, RUNTIME = "hypervisor.qemu.", "agent.kata.", "agent.kata.mem_agent.", "runtime."
PREFIX = "io.katacontainers.config.hypervisor."


@dataclass(frozen=True)
class Shown:
    """Setting the key to `value` makes `text` appear in what happens, or vanish with `gone`. `given` are other keys,
    with and without it; `set_by` is what sets it when it is part of another key's value.
    """

    value: str
    text: str
    given: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    set_by: str = ""
    gone: bool = False
    host_device: str = ""
    """What the container asks for."""


def extension(**changed: str) -> str:
    image = {"name": "tools", "path": "@/other"} | changed
    return f"[{{{', '.join(f'{key} = {json.dumps(value)}' for key, value in image.items())}}}]"


def shared(**changed: str) -> str:
    mount = {"src_ctr": "init", "src_path": "/s", "dst_ctr": "web", "dst_path": "/d"} | changed
    return f"[{{{', '.join(f'{key} = {json.dumps(value)}' for key, value in mount.items())}}}]"


IMAGE = {QEMU + "image": '"@/image"', QEMU + "initrd": '""'}
PMEM = IMAGE | {QEMU + "vm_rootfs_driver": '"virtio-pmem"'}
GROWS = {QEMU + "enable_virtio_mem": "true", QEMU + "default_maxmemory": "4096"}
SWAPS = {"io.katacontainers.container.resource.swappiness": "60"}
SCSI = {QEMU + "block_device_driver": '"virtio-scsi"'}
STORE = {QEMU + "enable_vhost_user_store": "true", QEMU + "vhost_user_store_path": '"@"'}
STATIC = {RUNTIME + "static_sandbox_resource_mgmt": "true"}
S390X = {QEMU + "machine_type": '"s390-ccw-virtio"'}
SECRET = {QEMU + "firmware": '"@/other"', QEMU + "shared_fs": '"none"'}
SNP = SECRET | {QEMU + "confidential_guest": "true", QEMU + "sev_snp_guest": "true"}
ID_BLOCK, ID_AUTH = (f'"{b64encode(bytes(size)).decode()}"' for size in (96, 4096))
# The file of a group of the host's devices.
GPU = "/dev/vfio/12"
EXTENSION = QEMU + "guest_extension_images"
SHARED = RUNTIME + "shared_mounts"
ENABLED = {MEM_AGENT + "mem_agent_enable": "true"}


def allowed(key: str) -> dict[str, str]:
    return {QEMU + "enable_annotations": f'["{key}"]'}


NOW: dict[str, Shown] = {
    QEMU + "path": Shown('"@/other"', "@/other\n-name"),
    QEMU + "kernel": Shown('"@/other"', "-kernel\n@/other\n"),
    QEMU + "initrd": Shown('"@/other"', "-initrd\n@/other\n"),
    QEMU + "image": Shown('"@/image"', "filename=@/image", {QEMU + "initrd": '""'}),
    QEMU + "image_initrd": Shown('"@/other"', "-initrd\n@/other\n", IMAGE),
    QEMU + "firmware": Shown('"@/other"', "-bios\n@/other\n"),
    QEMU + "firmware_volume": Shown(
        '"@/kernel"', "snapshot=on,file=@/kernel", {QEMU + "firmware": '"@/other"'}
    ),
    QEMU + "pflashes": Shown('["@/other"]', "readonly=on,file=@/other"),
    QEMU + "rootfs_type": Shown('"erofs"', "rootfstype=erofs", IMAGE),
    QEMU + "vm_rootfs_driver": Shown('"virtio-pmem"', "nvdimm,memdev=rootfs", IMAGE),
    QEMU + "disable_image_nvdimm": Shown("true", "virtio-blk-pci,drive=rootfs", PMEM),
    QEMU + "kernel_verity_params": Shown(f'"{VERITY}"', "dm-mod.create=", IMAGE),
    QEMU + "guest_extension_images": Shown(extension(), "serial=extension-tools"),
    EXTENSION + ".name": Shown(
        extension(name="more"), "serial=extension-more", {EXTENSION: extension()}, set_by=EXTENSION
    ),
    EXTENSION + ".path": Shown(
        extension(path="@/image"), "filename=@/image", {EXTENSION: extension()}, set_by=EXTENSION
    ),
    EXTENSION + ".verity_params": Shown(
        extension(verity_params=VERITY),
        f"kata.extension.tools.verity_params={VERITY}",
        {EXTENSION: extension()},
        set_by=EXTENSION,
    ),
    QEMU + "initdata": Shown(f'"{INITDATA}"', "node-name=initdata"),
    QEMU + "guest_dir": Shown(
        '"@/none"',
        "@/none/s390x/vmlinux does not exist",
        S390X | {QEMU + "kernel": '"/usr/share/kata-py/vmlinux"'},
    ),
    QEMU + "machine_type": Shown('"virt"', "-machine\nvirt,"),
    QEMU + "machine_accelerators": Shown('"usb=off"', "-machine\nq35,memory-backend=mem,usb=off\n"),
    QEMU + "cpu_features": Shown('"pmu=off"', "-cpu\nhost,pmu=off\n"),
    QEMU + "kernel_params": Shown('"mine=1"', " mine=1\n"),
    QEMU + "default_vcpus": Shown("1.5", "-smp\n2,maxcpus=8\n"),
    QEMU + "overhead_vcpus": Shown("1.0", "-smp\n3\n", STATIC),
    QEMU + "default_maxvcpus": Shown("4", "-smp\n1,maxcpus=4\n"),
    QEMU + "default_memory": Shown("300", "-m\n300M,"),
    QEMU + "overhead_memory": Shown("100", "-m\n400M\n", STATIC),
    QEMU + "memory_slots": Shown("5", "slots=5,", GROWS),
    QEMU + "default_maxmemory": Shown("8192", "maxmem=8G\n", GROWS),
    QEMU + "memory_offset": Shown("1024", "maxmem=5G\n", GROWS),
    QEMU + "enable_virtio_mem": Shown("true", "virtio-mem-pci,"),
    QEMU + "enable_mem_prealloc": Shown("true", "prealloc=on"),
    QEMU + "enable_hugepages": Shown("true", "hugetlb=on"),
    QEMU + "hugepage_type": Shown('"thp"', "hugetlb=on", {QEMU + "enable_hugepages": "true"}, gone=True),
    QEMU + "file_mem_backend": Shown('"@"', "mem-path=@,"),
    QEMU + "enable_numa": Shown("true", "-numa\nnode,nodeid=1,cpus=1,"),
    QEMU + "numa_mapping": Shown('["0", "0"]', "-numa\nnode,nodeid=1,cpus=1,"),
    QEMU + "reclaim_guest_freed_memory": Shown("true", "free-page-reporting=on"),
    QEMU + "shared_fs": Shown('"none"', 'driver: "virtio-fs"', gone=True),
    QEMU + "virtio_fs_daemon": Shown('"@/other"', "daemon=PosixPath('@/other')"),
    QEMU + "virtio_fs_cache": Shown('"always"', "cache='always'"),
    QEMU + "virtio_fs_queue_size": Shown("512", "queue-size=512"),
    QEMU + "virtio_fs_extra_args": Shown('["-o", "x"]', "extra_args=('-o', 'x')"),
    QEMU + "virtio_fs_cache_size": Shown("512", 'options: "dax"', {QEMU + "virtio_fs_cache": '"always"'}),
    QEMU + "virtio_fs_is_dax": Shown("true", ",cache-size=1G\n"),
    QEMU + "msize_9p": Shown("4096", "msize=4096", S390X),
    QEMU + "disable_block_device_use": Shown("true", "id=disk-bridge,", gone=True),
    QEMU + "block_device_driver": Shown('"virtio-scsi"', "virtio-scsi-pci,"),
    QEMU + "block_device_logical_sector_size": Shown("512", "disk_logical_sector_bytes=512"),
    QEMU + "block_device_physical_sector_size": Shown("4096", "disk_physical_sector_bytes=4096"),
    QEMU + "block_device_aio": Shown(
        '"threads"', "aio=threads", IMAGE | {QEMU + "block_device_aio": '"native"'}
    ),
    QEMU + "block_device_cache_set": Shown("true", "cache.direct=off", IMAGE),
    QEMU + "block_device_cache_direct": Shown(
        "true", "cache.direct=on", IMAGE | {QEMU + "block_device_cache_set": "true"}
    ),
    QEMU + "block_device_cache_noflush": Shown(
        "true", "cache.no-flush=on", IMAGE | {QEMU + "block_device_cache_set": "true"}
    ),
    QEMU + "enable_iothreads": Shown("true", "iothread=rootfs-io", IMAGE),
    QEMU + "indep_iothreads": Shown("2", "iothread,id=spare-io1", {QEMU + "enable_iothreads": "true"}),
    QEMU + "queue_size": Shown("64", "queue-size=64", IMAGE),
    QEMU + "num_queues": Shown("2", "num-queues=2", IMAGE),
    QEMU + "enable_vhost_user_store": Shown(
        "true", "pci-bridge,id=disk-bridge,", {**SCSI, QEMU + "vhost_user_store_path": '"@"'}
    ),
    QEMU + "vhost_user_store_path": Shown('"@/none"', "/none' is no directory", STORE),
    QEMU + "vhost_user_reconnect_timeout_sec": Shown("3", "vhost_user_reconnect_s=3,", STORE),
    QEMU + "pcie_root_port": Shown("1", "pcie-root-port,id=rp0,"),
    QEMU + "pcie_switch_port": Shown("1", "xio3130-downstream,"),
    QEMU + "enable_iommu": Shown("true", "intel-iommu,"),
    QEMU + "enable_iommu_platform": Shown("true", "iommu_platform=on", S390X),
    QEMU + "entropy_source": Shown('"/dev/zero"', "rng-random,id=rng0,filename=/dev/zero\n"),
    QEMU + "guest_hook_path": Shown('"/hooks"', 'guest_hook_path: "/hooks"'),
    QEMU + "seccomp_sandbox": Shown('"on"', "-sandbox\non\n"),
    QEMU + "seccompsandbox": Shown('"on"', "-sandbox\non\n"),
    QEMU + "disable_nested_virtualization": Shown("true", "host,vmx=off,svm=off\n"),
    QEMU + "rootless": Shown("true", "user=User(", {QEMU + "accel": '"tcg"'}),
    QEMU + "selinux_label": Shown('"a:b:c:s0"', "a:b:c:s0"),
    QEMU + "disable_selinux": Shown("true", "a:b:c:s0", {QEMU + "selinux_label": '"a:b:c:s0"'}, gone=True),
    QEMU + "confidential_guest": Shown("true", '"qom-type":"tdx-guest"', SECRET),
    QEMU + "sev_snp_guest": Shown("true", "sev-snp-guest,", SECRET | {QEMU + "confidential_guest": "true"}),
    QEMU + "snp_id_block": Shown(ID_BLOCK, "id-block=AAAA", SNP | {QEMU + "snp_id_auth": ID_AUTH}),
    QEMU + "snp_id_auth": Shown(ID_AUTH, "id-auth=AAAA", SNP | {QEMU + "snp_id_block": ID_BLOCK}),
    QEMU + "snp_guest_policy": Shown("0xB0000", "policy=0xb0000", SNP),
    QEMU + "tdx_quote_generation_service_socket_port": Shown(
        "5000", '"port":"5000"', SECRET | {QEMU + "confidential_guest": "true"}
    ),
    QEMU + "enable_annotations": Shown(
        '["default_memory"]', "-m\n300M,", annotations={"default_memory": "300"}
    ),
    QEMU + "valid_hypervisor_paths": Shown(
        '["@/o*"]', "@/other\n-name", allowed("path"), {"path": "@/other"}
    ),
    QEMU + "valid_virtio_fs_daemon_paths": Shown(
        '["@/o*"]',
        "daemon=PosixPath('@/other')",
        allowed("virtio_fs_daemon"),
        {"virtio_fs_daemon": "@/other"},
    ),
    QEMU + "valid_vhost_user_store_paths": Shown(
        '["@/o*"]',
        "is not a path that pods may name",
        allowed("vhost_user_store_path"),
        {"vhost_user_store_path": "@/other"},
        gone=True,
    ),
    QEMU + "valid_entropy_sources": Shown(
        '["/dev/zero"]', "filename=/dev/zero", allowed("entropy_source"), {"entropy_source": "/dev/zero"}
    ),
    QEMU + "valid_file_mem_backends": Shown(
        '["/dev/shm"]', "mem-path=/dev/shm", allowed("file_mem_backend"), {"file_mem_backend": "/dev/shm"}
    ),
    QEMU + "enable_debug": Shown("true", " agent.log_vport=1025 "),
    QEMU + "log_level": Shown('"warn"', "logged: ['warning', ", {RUNTIME + "log_level": '"error"'}),
    QEMU + "extra_monitor_socket": Shown('"hmp"', "extra-monitor.sock", {QEMU + "enable_debug": "true"}),
    QEMU + "guest_memory_dump_path": Shown('"@/dumps"', "@/dumps"),
    QEMU + "guest_memory_dump_paging": Shown(
        "true", "paging=True", {QEMU + "guest_memory_dump_path": '"@/dumps"'}
    ),
    QEMU + "enable_guest_swap": Shown(
        "true", "AddSwap PCIPath: 30", {QEMU + "guest_swap_path": '"@/swap"'}, annotations=SWAPS
    ),
    QEMU + "guest_swap_path": Shown(
        '"@/other-swap"',
        "plugged in: @/other-swap/",
        {QEMU + "enable_guest_swap": "true", QEMU + "guest_swap_path": '"@/swap"'},
        annotations=SWAPS,
    ),
    QEMU + "disable_vhost_net": Shown("true", "vhost=False"),
    QEMU + "network_queues": Shown("2", ",mq=on,vectors=6"),
    QEMU + "rx_rate_limiter_max_rate": Shown("8000", "in and out: (8000, 0)"),
    QEMU + "tx_rate_limiter_max_rate": Shown("9000", "in and out: (0, 9000)"),
    QEMU + "cold_plug_vfio": Shown(
        '"root-port"', "vfio-pci,id=vfio-0000-3b-00.0,host=0000:3b:00.0,bus=rp0", host_device=GPU
    ),
    QEMU + "hot_plug_vfio": Shown('"switch-port"', "plugged in: 0000:3b:00.0", host_device=GPU),
    QEMU + "hotplug_vfio_on_root_bus": Shown("true", "pcie-root-port,id=rp0,"),
    QEMU + "accel": Shown('"tcg"', "-accel\ntcg,"),
    QEMU + "vsock": Shown('"vhost"', "vhost-vsock-pci,"),
    QEMU + "qmp_read_timeout_ms": Shown("300", "read_timeout_s=0.3,"),
    QEMU + "qmp_connect_timeout_ms": Shown("6000", "connect_timeout_s=6.0,"),
    QEMU + "qmp_retry_pause_ms": Shown("70", "retry_pause_s=0.07,"),
    QEMU + "boot_timeout_s": Shown("7", "patience with the guest: 7 s"),
    AGENT + "enable_debug": Shown("true", "agent.log=debug"),
    AGENT + "enable_tracing": Shown("true", "agent.trace=true"),
    AGENT + "kernel_modules": Shown('["loop a=1"]', 'name: "loop"\n  parameters: "a=1"'),
    AGENT + "debug_console_enabled": Shown("true", "agent.debug_console agent.debug_console_vport=1026"),
    AGENT + "dial_timeout_ms": Shown("20", "next attempt after 0.02 s", {RUNTIME + "enable_debug": "true"}),
    AGENT + "create_container_timeout": Shown("90", "_create_container_timeout_s: 90"),
    AGENT + "launch_process_timeout": Shown("6", "agent.launch_process_timeout=6"),
    AGENT + "cdh_api_timeout_ms": Shown("7000", "agent.cdh_api_timeout=7"),
    AGENT + "log_level": Shown('"error"', "port 1025, level 40", {QEMU + "enable_debug": "true"}),
    AGENT + "visible_cdi_devices": Shown("true", "agent.visible_cdi_devices=true"),
    AGENT + "server_port": Shown("2000", "connect to port 2000"),
    AGENT + "log_port": Shown("2001", "agent.log_vport=2001", {AGENT + "enable_debug": "true"}),
    AGENT + "health_check_request_timeout_ms": Shown("9000", "_check_s: 9.0"),
    AGENT + "container_pipe_size": Shown("4096", "agent.container_pipe_size=4096"),
    AGENT + "policy": Shown('"package a"', 'SetPolicy policy: "package a"'),
    AGENT + "server_addr": Shown('"unix:@/agent.sock"', "connect to port", gone=True),
    MEM_AGENT + "mem_agent_enable": Shown("true", "psi=1 agent.mem_agent_enable=1"),
    MEM_AGENT + "enable": Shown("true", "psi=1 agent.mem_agent_enable=1"),
    **{
        f"{MEM_AGENT}{name}": Shown("true", f"agent.mem_agent_{name}=1", ENABLED)
        for name in ("memcg_disable", "memcg_swap", "compact_disable")
    },
    **{
        f"{MEM_AGENT}{name}": Shown("7", f"agent.mem_agent_{name}=7", ENABLED)
        for name in (
            *("memcg_swappiness_max", "memcg_period_secs", "memcg_period_psi_percent_limit"),
            *(
                "memcg_eviction_psi_percent_limit",
                "memcg_eviction_run_aging_count_min",
                "compact_period_secs",
            ),
            *("compact_period_psi_percent_limit", "compact_psi_percent_limit", "compact_sec_max"),
            *("compact_order", "compact_threshold", "compact_force_times"),
        )
    },
    RUNTIME + "enable_debug": Shown("true", "logged: ['debug', "),
    RUNTIME + "log_level": Shown('"error"', "logged: ['error', ", {QEMU + "log_level": '"error"'}),
    RUNTIME + "name": Shown('"linux_container"', "runtime.name: want virt_container"),
    RUNTIME + "hypervisor_name": Shown('"clh"', "runtime.hypervisor_name: want qemu"),
    RUNTIME + "agent_name": Shown('"other"', "runtime.agent_name: want kata"),
    RUNTIME + "internetworking_model": Shown('"none"', "virtio-net-pci,", gone=True),
    RUNTIME + "sandbox_cgroup_only": Shown("true", "control group /pods/web"),
    RUNTIME + "enable_vcpus_pinning": Shown("true", "monitor: query-cpus-fast"),
    RUNTIME + "dan_conf": Shown('"@/dans"', "mac=0a:58:0a:d6:09:09"),
    RUNTIME + "disable_new_netns": Shown("true", "netns=None"),
    RUNTIME + "disable_guest_seccomp": Shown("true", "SCMP_ACT_ERRNO", gone=True),
    RUNTIME + "static_sandbox_resource_mgmt": Shown("true", "-m\n300M\n"),
    RUNTIME + "sandbox_bind_mounts": Shown('["@/other"]', "seen by every guest: ('@/other:ro',)"),
    RUNTIME + "emptydir_mode": Shown(
        '"block-plain"', "/kubernetes.io~empty-dir/c/kata-disk.img, discard=True"
    ),
    RUNTIME + "proxy_host_sockets": Shown("true", "ListenSocket name:"),
    RUNTIME + "vfio_mode": Shown(
        '"vfio"', 'type: "vfio-pci"\n', {QEMU + "hot_plug_vfio": '"root-port"'}, host_device=GPU
    ),
    RUNTIME + "pod_resource_api_sock": Shown(
        '"@/none"',
        "failure: pod_resource_api_sock: the kubelet at @/none cannot be asked",
        {QEMU + "cold_plug_vfio": '"root-port"'},
    ),
    RUNTIME + "keep_abnormal": Shown("true", "is kept: True"),
    SHARED: Shown(shared(), "shared_mounts {"),
    SHARED + ".name": Shown(shared(name="mine"), 'name: "mine"', {SHARED: shared()}, set_by=SHARED),
    SHARED + ".src_ctr": Shown(shared(src_ctr="db"), 'src_ctr: "db"', {SHARED: shared()}, set_by=SHARED),
    SHARED + ".src_path": Shown(shared(src_path="/x"), 'src_path: "/x"', {SHARED: shared()}, set_by=SHARED),
    SHARED + ".dst_ctr": Shown(shared(), 'dst_ctr: "web"', {SHARED: shared(dst_ctr="db")}, set_by=SHARED),
    SHARED + ".dst_path": Shown(shared(dst_path="/x"), 'dst_path: "/x"', {SHARED: shared()}, set_by=SHARED),
}

# A value that is not the default, of keys without effect.
OTHERS: dict[str, dict[str, str]] = {
    "warned": {
        QEMU + "disk_rate_limiter_bw_max_rate": "1",
        QEMU + "disk_rate_limiter_ops_max_rate": "1",
        QEMU + "default_bridges": "2",
        MEM_AGENT + "create_container_timeout": "30",
        RUNTIME + "enable_tracing": "true",
        RUNTIME + "enable_pprof": "true",
        "factory.vm_cache_number": "1",
    },
    "refused": {
        QEMU + "disable_guest_selinux": "false",
        QEMU + "jailer_path": '"/x"',
        QEMU + "valid_jailer_paths": '["/x"]',
        QEMU + "boot_to_be_template": "true",
        QEMU + "boot_from_template": "true",
        QEMU + "factory.enable_template": "true",
        RUNTIME + "experimental": '["force_guest_pull"]',
        RUNTIME + "guest_selinux_label": '"x"',
        "factory.enable_template": "true",
    },
    "ignored": {
        QEMU + "prefetch_list_path": '"/x"',
        QEMU + "disk_rate_limiter_bw_one_time_burst": "1",
        QEMU + "disk_rate_limiter_ops_one_time_burst": "1",
        QEMU + "use_legacy_serial": "true",
        QEMU + "disable_seccomp": "true",
        QEMU + "disable_nesting_checks": "true",
        QEMU + "ctlpath": '"/x"',
        QEMU + "valid_ctlpaths": '["/x"]',
        QEMU + "guest_swap_size_percent": "1",
        QEMU + "guest_swap_create_threshold_secs": "1",
        QEMU + "hypervisor_socket": '"/x"',
        QEMU + "hypervisor_timeout": "1",
        QEMU + "default_gpus": "1",
        QEMU + "default_gpu_model": '"x"',
        QEMU + "memory_path": '"/x"',
        QEMU + "device_state_path": '"/x"',
        QEMU + "factory.template_path": '"/x"',
        QEMU + "rootless_user.uid": "1",
        QEMU + "rootless_user.gid": "1",
        QEMU + "rootless_user.groups": "[1]",
        QEMU + "rootless_user.user_name": '"x"',
        AGENT + "reconnect_timeout_ms": "4000",
        AGENT + "passfd_listener_port": "1",
        RUNTIME + "jaeger_endpoint": '"x"',
        RUNTIME + "jaeger_user": '"x"',
        RUNTIME + "jaeger_password": '"x"',
        RUNTIME + "disable_guest_empty_dir": "true",
        RUNTIME + "use_passfd_io": "true",
        RUNTIME + "passfd_listener_port": "1",
        "factory.template_path": '"/x"',
        "factory.vm_cache_endpoint": '"/x"',
    },
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    (made.root / "other").touch(mode=0o755)
    (made.root / "image").write_bytes(bytes(4096))
    (made.root / "dumps").mkdir()
    monkeypatch.setattr(HostLimits, "of_this_host", lambda: HOST)
    return made


def text_of(site: Site, keys: Mapping[str, str]) -> str:
    """A file that sets these keys, beside those that every guest needs."""
    required = {
        f"{QEMU}{line.split(' = ')[0]}": line.split(" = ")[1] for line in site.required().splitlines()
    }
    sections: dict[str, list[str]] = {}
    for key, value in (required | dict(keys)).items():
        header, _, name = key.rpartition(".")
        sections.setdefault(header, []).append(f"{name} = {value.replace('@', str(site.root))}\n")
    return "".join(f"[{header}]\n{''.join(lines)}" for header, lines in sections.items())


def declared() -> dict[str, str]:
    """Every key with its effect."""
    return {
        f"{header}.{name}": info(section, name).effect
        for header, section in SECTIONS.items()
        for name in section.__struct_fields__
        if not _is_section(section, name)
    }


def _is_section(section: type[Section], name: str) -> bool:
    kind = section.__annotations__[name]
    return isinstance(kind, type) and issubclass(kind, Section)


def test_every_key_has_a_row() -> None:
    rows = {"now": set(NOW), **{effect: set(keys) for effect, keys in OTHERS.items()}}
    wanted: dict[str, set[str]] = {effect: set() for effect in rows}
    for key, effect in declared().items():
        wanted[effect].add(key)
    assert rows == wanted


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """What happens with nothing set, once somebody has looked."""
    return {}


@pytest.mark.parametrize("key", NOW)
async def test_what_it_does(site: Site, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    row = NOW[key]
    asked = {
        name if name.startswith("io.") else PREFIX + name: value.replace("@", str(site.root))
        for name, value in row.annotations.items()
    }
    before = await done_by(site.root, text_of(site, row.given), asked, monkeypatch, row.host_device)
    text = text_of(site, {**row.given, row.set_by or key: row.value})
    after = await done_by(site.root, text, asked, monkeypatch, row.host_device)
    assert (row.text in before, row.text in after) == (row.gone, not row.gone), after


async def test_a_policy_that_nobody_enforces(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeAgent, "__init__", _without_policies(FakeAgent.__init__))
    seen = await done_by(site.root, text_of(site, {AGENT + "policy": '"package a"'}), {}, monkeypatch)
    assert "failure: policy of [agent.kata] is set, and the guest's agent enforces none; remove it" in seen


def _without_policies(init: Callable[..., None]) -> Callable[..., None]:
    def made(agent: FakeAgent, path: Path) -> None:
        init(agent, path)
        agent.fail("SetPolicy", Code.UNIMPLEMENTED, "unknown method SetPolicy")

    return made


def loaded(site: Site, key: str, value: str) -> tuple[str, ...]:
    """The warnings of a file that sets one key. Raises ConfigError."""
    site.file.write_text(text_of(site, {key: value}))
    return load(site.file, env=dict(os.environ), host=HOST).warnings


def reason_for(key: str) -> str:
    header, _, name = key.rpartition(".")
    return info(SECTIONS[header], name).why


@pytest.mark.parametrize(("key", "value"), OTHERS["warned"].items(), ids=OTHERS["warned"])
async def test_no_effect_is_warned_of(
    site: Site, monkeypatch: pytest.MonkeyPatch, known: dict[str, str], key: str, value: str
) -> None:
    (line,) = loaded(site, key, value)
    assert line.startswith(f"{site.file}: {key}: no effect in this version: {reason_for(key)}")
    await same_as_without(site, monkeypatch, known, key, value)


@pytest.mark.parametrize(("key", "value"), OTHERS["ignored"].items(), ids=OTHERS["ignored"])
async def test_nothing_changes(
    site: Site, monkeypatch: pytest.MonkeyPatch, known: dict[str, str], key: str, value: str
) -> None:
    assert loaded(site, key, value) == ()
    await same_as_without(site, monkeypatch, known, key, value)


async def same_as_without(
    site: Site, monkeypatch: pytest.MonkeyPatch, known: dict[str, str], key: str, value: str
) -> None:
    if not known:
        known[""] = await done_by(site.root, text_of(site, {}), {}, monkeypatch)
    assert await done_by(site.root, text_of(site, {key: value}), {}, monkeypatch) == known[""]


@pytest.mark.parametrize(("key", "value"), OTHERS["refused"].items(), ids=OTHERS["refused"])
def test_refusals_say_why_and_what_to_do(site: Site, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(site, key, value)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{site.file}: {key}: not supported in this version: {reason_for(key)} (")
    assert line.endswith(")")

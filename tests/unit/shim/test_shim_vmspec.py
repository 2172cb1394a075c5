"""From the configuration to the machine, without a host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from config import Agent, Config
from config.schema import GuestExtensionImage, MemAgent, Qemu
from hypervisor.extension import Extension
from hypervisor.verity import Verity
from shim.vmspec import vm_spec, wants_agent_log

if TYPE_CHECKING:
    from hypervisor.spec import VmSpec

VERITY = f"root_hash={'4f' * 32},salt=a0,data_blocks=8,data_block_size=4096,hash_block_size=4096"


def spec(qemu: dict[str, Any] | None = None, agent: dict[str, Any] | None = None, **more: Any) -> VmSpec:
    config = Config(hypervisor=replace(Qemu(), **(qemu or {})), agent=replace(Agent(), **(agent or {})))
    decided: dict[str, Any] = {
        "accel": "tcg", "vsock": "user", "virtiofsd": Path("/v"), "exported": Path("/e"), "netns": None,
        "tsc_khz": None,
    }  # fmt: skip
    return vm_spec(config, "s1", **(decided | more))


def test_decisions_of_the_caller() -> None:
    found = spec(accel="kvm", vsock="vhost", netns=Path("/n"), tsc_khz=5)
    assert (found.name, found.run_dir) == ("sandbox-s1", Path("/run/kata-py/s1"))
    assert (found.accel, found.vsock, found.netns, found.tsc_khz) == ("kvm", "vhost", Path("/n"), 5)
    assert (found.shares[0].tag, found.shares[0].directory, found.shares[0].daemon) == (
        "kataShared",
        Path("/e"),
        Path("/v"),
    )


def test_size_of_the_image() -> None:
    assert spec({"image": "/i"}, image_bytes=4096).image_bytes == 4096


def test_nothing_shared() -> None:
    for machine_type in ("q35", "s390-ccw-virtio"):
        found = spec({"machine_type": machine_type}, virtiofsd=None)
        assert (found.shares, found.exports) == ((), ())


@pytest.mark.parametrize(
    ("machine_type", "host", "by_9p"),
    [
        ("q35", "little", False),
        ("virt", "little", False),
        ("s390-ccw-virtio", "little", True),
        ("s390-ccw-virtio", "big", False),
        ("virt", "big", True),
    ],
)
def test_guests_of_another_byte_order_have_9p(
    monkeypatch: pytest.MonkeyPatch, machine_type: str, host: str, by_9p: bool
) -> None:
    monkeypatch.setattr("sys.byteorder", host)
    found = spec({"machine_type": machine_type})
    assert [(export.tag, export.directory) for export in found.exports] == [
        ("kataShared", Path("/e"))
    ] * by_9p
    assert len(found.shares) == (not by_9p)


@pytest.mark.parametrize(
    ("qemu", "field", "value"),
    [
        ({"path": "/q"}, "qemu_path", Path("/q")),
        ({"kernel": "/k"}, "kernel", Path("/k")),
        ({"initrd": "/i"}, "initrd", Path("/i")),
        ({"firmware": ""}, "firmware", None),
        ({"firmware": "/f"}, "firmware", Path("/f")),
        ({"machine_type": "q35"}, "machine_type", "q35"),
        ({"machine_accelerators": "a=b"}, "machine_accelerators", "a=b"),
        ({"cpu_features": "-x"}, "cpu_features", "-x"),
        ({"default_vcpus": 1.0}, "vcpus", 1),
        ({"default_vcpus": 1.2}, "vcpus", 2),
        ({"default_vcpus": 0.5}, "vcpus", 1),
        ({"default_vcpus": 3.0}, "vcpus", 3),
        ({"default_memory": 300}, "memory_mib", 300),
        ({"kernel_params": "a b=c"}, "kernel_params", "a b=c"),
        ({"seccomp_sandbox": "on"}, "seccomp_sandbox", "on"),
        ({"selinux_label": "u:r:t"}, "selinux_label", "u:r:t"),
        ({"selinux_label": "u:r:t", "disable_selinux": True}, "selinux_label", ""),
        ({"guest_memory_dump_path": ""}, "dump_dir", None),
        ({"guest_memory_dump_path": "/var/crash"}, "dump_dir", Path("/var/crash/s1")),
        ({"guest_memory_dump_paging": True}, "dump_paging", True),
        ({"machine_type": "q35"}, "arch", "x86_64"),
        ({"machine_type": "virt"}, "arch", "aarch64"),
        ({"machine_type": "s390-ccw-virtio"}, "arch", "s390x"),
        ({"image": "/i", "vm_rootfs_driver": "virtio-pmem"}, "rootfs_driver", "nvdimm"),
        ({"image": "/i", "image_initrd": "/j"}, "image_initrd", Path("/j")),
        (
            {"image": "/i", "vm_rootfs_driver": "virtio-pmem", "disable_image_nvdimm": True},
            "rootfs_driver",
            "virtio-blk",
        ),
        ({"image": "/i", "vm_rootfs_driver": "virtio-blk-ccw"}, "rootfs_driver", "virtio-blk"),
        ({"initrd": "/i", "vm_rootfs_driver": "virtio-pmem"}, "rootfs_driver", "virtio-blk"),
        ({"kernel_verity_params": ""}, "verity", None),
        ({"kernel_verity_params": VERITY}, "verity", Verity.parse(VERITY)),
        ({"pflashes": ("/a", "/b")}, "pflash", (Path("/a"), Path("/b"))),
        ({"firmware": "/f", "firmware_volume": "/v"}, "pflash", (Path("/f"), Path("/v"))),
        ({"firmware": "/f", "firmware_volume": "/v"}, "firmware", None),
        ({"enable_mem_prealloc": True}, "memory_prealloc", True),
        ({"enable_hugepages": True}, "hugepages", True),
        ({"enable_hugepages": True, "hugepage_type": "thp"}, "hugepages", False),
        ({"file_mem_backend": "/dev/shm"}, "memory_dir", Path("/dev/shm")),
        ({"enable_iommu": True}, "iommu", True),
        ({"enable_iothreads": True}, "iothread", True),
        ({"pcie_root_port": 2}, "pcie_root_ports", 2),
        ({"pcie_switch_port": 3}, "pcie_switch_ports", 3),
        ({"extra_monitor_socket": "hmp"}, "extra_monitor", None),
        ({"extra_monitor_socket": "hmp", "enable_debug": True}, "extra_monitor", "hmp"),
        ({"extra_monitor_socket": "", "enable_debug": True}, "extra_monitor", None),
        ({"enable_debug": True}, "debug", True),
        ({"enable_iommu_platform": True}, "iommu_platform", True),
        ({"disable_nested_virtualization": True}, "nested_virtualization", False),
        ({"reclaim_guest_freed_memory": True}, "balloon", True),
        ({"entropy_source": "/dev/urandom"}, "entropy_source", None),
        ({"entropy_source": "/dev/hwrng"}, "entropy_source", Path("/dev/hwrng")),
        ({"memory_slots": 3, "default_maxmemory": 4096}, "memory_slots", 3),
        ({"memory_slots": 3, "shared_fs": "none"}, "memory_slots", 3),
        ({"memory_slots": 3, "image": "/i", "vm_rootfs_driver": "virtio-pmem"}, "memory_slots", 3),
        ({"memory_slots": 3, "confidential_guest": True}, "memory_slots", 0),
        ({"memory_slots": 3, "enable_virtio_mem": True}, "memory_slots", 3),
        ({"default_maxmemory": 4096}, "max_memory_mib", 4096),
        ({"default_maxmemory": 4096, "memory_offset": 5, "enable_virtio_mem": True}, "max_memory_mib", 4101),
        ({"enable_virtio_mem": True}, "virtio_mem", True),
        ({"block_device_aio": "threads"}, "disk_aio", "threads"),
        ({"block_device_aio": "io_uring"}, "disk_aio", "io_uring"),
        ({"block_device_aio": "native"}, "disk_cache_direct", True),
        ({"block_device_cache_direct": True}, "disk_cache_direct", None),
        ({"block_device_cache_direct": True, "block_device_cache_set": True}, "disk_cache_direct", True),
        ({"block_device_cache_set": True}, "disk_cache_direct", False),
        ({"block_device_cache_noflush": True}, "disk_cache_no_flush", None),
        ({"block_device_cache_noflush": True, "block_device_cache_set": True}, "disk_cache_no_flush", True),
        ({"queue_size": 64}, "disk_queue_size", 64),
        ({"num_queues": 4}, "disk_queues", 4),
        ({"block_device_driver": "virtio-scsi"}, "scsi", True),
        ({"block_device_driver": "virtio-scsi"}, "disk_places", False),
        ({"block_device_driver": "virtio-scsi", "disable_block_device_use": True}, "scsi", False),
        ({"block_device_driver": "virtio-pmem"}, "disk_places", False),
        ({"disable_block_device_use": True}, "disk_places", False),
        ({}, "disk_places", True),
        ({}, "scsi", False),
        ({}, "disk_logical_sector_bytes", None),
        ({"block_device_physical_sector_size": 4096}, "disk_physical_sector_bytes", 4096),
        ({"indep_iothreads": 2}, "spare_iothreads", 0),
        (
            {"indep_iothreads": 2, "enable_iothreads": True, "disable_block_device_use": True},
            "spare_iothreads",
            0,
        ),
        ({"indep_iothreads": 2, "enable_iothreads": True}, "spare_iothreads", 2),
        (
            {"guest_extension_images": (GuestExtensionImage(name="a", path="/e", verity_params="v"),)},
            "extensions",
            (Extension(name="a", image=Path("/e"), verity_params="v"),),
        ),
        ({"enable_debug": True}, "log_vport", 1025),
        ({}, "log_vport", None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configuration(qemu: dict[str, Any], field: str, value: object) -> None:
    assert getattr(spec(qemu), field) == value


def test_io_uring_where_the_host_forbids_it() -> None:
    assert spec({"block_device_aio": "io_uring"}, io_uring=False).disk_aio == "threads"
    assert spec({"block_device_aio": "native"}, io_uring=False).disk_aio == "native"


@pytest.mark.parametrize(("accel", "most"), [("kvm", 6), ("tcg", 0)])
def test_processors_to_be_added_are_for_kvm(accel: str, most: int) -> None:
    assert spec({"default_maxvcpus": 6}, accel=accel).max_vcpus == most


def test_share_settings() -> None:
    qemu = {"virtio_fs_cache": "always", "virtio_fs_queue_size": 512, "virtio_fs_extra_args": ("-o", "x")}
    share = spec(qemu).shares[0]
    assert (share.cache, share.queue_size, share.extra_args) == ("always", 512, ("-o", "x"))
    share = spec({"virtio_fs_cache": "none", "virtio_fs_queue_size": 0}).shares[0]
    assert (share.cache, share.queue_size) == ("never", 1024)


def test_monitor_timeouts_are_seconds() -> None:
    qemu = {"qmp_read_timeout_ms": 250, "qmp_connect_timeout_ms": 5000, "qmp_retry_pause_ms": 50}
    qmp = spec(qemu).qmp
    assert (qmp.read_timeout_s, qmp.connect_timeout_s, qmp.retry_pause_s) == (0.25, 5.0, 0.05)


def test_words_for_the_agent_come_before_the_user_s() -> None:
    found = spec({"kernel_params": "mine"}, {"enable_debug": True, "container_pipe_size": 4096})
    assert found.kernel_params == "agent.log=debug agent.container_pipe_size=4096 mine"
    assert found.log_vport == Agent().log_port


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ({"log_level": "warn"}, "agent.log=warn"),
        ({"log_level": "error", "enable_debug": True}, "agent.log=debug"),
        ({"server_port": 2000}, "agent.server_addr=vsock://-1:2000"),
        ({"enable_tracing": True}, "agent.trace=true"),
        ({"launch_process_timeout": 6}, "agent.launch_process_timeout=6"),
        ({"cdh_api_timeout_ms": 50_000}, ""),
        ({"cdh_api_timeout_ms": 0}, ""),
        ({"cdh_api_timeout_ms": 1}, "agent.cdh_api_timeout=1"),
        ({"cdh_api_timeout_ms": 60_001}, "agent.cdh_api_timeout=61"),
        ({"debug_console_enabled": True}, "agent.debug_console agent.debug_console_vport=1026"),
        ({"visible_cdi_devices": True}, "agent.visible_cdi_devices=true"),
        ({"mem_agent": MemAgent(memcg_swap=True)}, ""),
        ({"mem_agent": MemAgent(enable=True)}, "psi=1 agent.mem_agent_enable=1"),
        (
            {"mem_agent": MemAgent(mem_agent_enable=True, compact_order=9, memcg_disable=True)},
            "psi=1 agent.mem_agent_enable=1 agent.mem_agent_memcg_disable=1 agent.mem_agent_compact_order=9",
        ),
    ],
)
def test_words_for_the_agent(agent: dict[str, Any], words: str) -> None:
    assert spec(agent=agent).kernel_params == words


@pytest.mark.parametrize(("machine", "agent", "wanted"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_agent_log(machine: bool, agent: bool, wanted: bool) -> None:
    config = Config(
        hypervisor=replace(Qemu(), enable_debug=bool(machine)),
        agent=replace(Agent(), enable_debug=bool(agent)),
    )
    assert wants_agent_log(config) is bool(wanted)


@pytest.mark.parametrize(
    ("level", "wanted"), [("trace", True), ("debug", True), ("info", False), ("error", False)]
)
def test_a_level_that_asks_for_more_brings_the_agents_log(level: str, wanted: bool) -> None:
    config = Config(agent=replace(Agent(), log_level=level))
    assert wants_agent_log(config) is wanted

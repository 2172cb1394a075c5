"""From the configuration to the machine, without a host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from config import Agent, Config
from config.schema import Qemu
from shim.vmspec import vm_spec, wants_agent_log

if TYPE_CHECKING:
    from hypervisor.spec import VmSpec


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


def test_nothing_shared() -> None:
    assert spec(virtiofsd=None).shares == ()


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
        ({"enable_debug": True}, "debug", True),
        ({"enable_debug": True}, "log_vport", 1025),
        ({}, "log_vport", None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configuration(qemu: dict[str, Any], field: str, value: object) -> None:
    assert getattr(spec(qemu), field) == value


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


@pytest.mark.parametrize(("machine", "agent", "wanted"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_agent_log(machine: bool, agent: bool, wanted: bool) -> None:
    config = Config(
        hypervisor=replace(Qemu(), enable_debug=bool(machine)),
        agent=replace(Agent(), enable_debug=bool(agent)),
    )
    assert wants_agent_log(config) is bool(wanted)

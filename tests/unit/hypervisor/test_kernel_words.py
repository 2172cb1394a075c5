"""The kernel's command line: what is on it, and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor.arch import arch_named
from hypervisor.qemu.kernel_words import kernel_command_line, merged, split
from hypervisor.spec import VmSpec


def words(**fields: Any) -> list[str]:
    spec = VmSpec(
        **{"name": "vm", "run_dir": Path("/run/vm"), "qemu_path": Path("/q"), "kernel": Path("/k"), **fields}
    )
    return split(kernel_command_line(spec, arch_named(spec.arch)))


@pytest.mark.parametrize(
    ("ours", "configured", "result"),
    [
        (["quiet", "panic=-1"], ["panic=10"], ["quiet", "panic=10"]),
        (["quiet"], ["quiet"], ["quiet"]),
        (["a=1", "b", "a=2"], ["a=3"], ["b", "a=3"]),
        (["log_buf_len=1M"], ["log-buf-len=2M"], ["log-buf-len=2M"]),
        (["console=ttyS0"], ["console=hvc0"], ["console=ttyS0", "console=hvc0"]),
        (["console=ttyS0", "b"], ["console=ttyS0"], ["console=ttyS0", "b"]),
        (["systemd.mask=x"], ["systemd.mask=y"], ["systemd.mask=x", "systemd.mask=y"]),
        (["a"], ["x=1", "x=2"], ["a", "x=2"]),
        (["ab=1"], ["a=2"], ["ab=1", "a=2"]),
    ],
)
def test_configured_words_replace_ours(ours: list[str], configured: list[str], result: list[str]) -> None:
    assert merged(ours, configured) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", []),
        ("  a\tb=1  c ", ["a", "b=1", "c"]),
        ('dm-mod.create="dm-verity,,,ro,0 1 verity" x', ['dm-mod.create="dm-verity,,,ro,0 1 verity"', "x"]),
        ('open="no end', ['open="no end']),
    ],
)
def test_split(text: str, result: list[str]) -> None:
    assert split(text) == result


def test_stock_kata_guests_find_their_words() -> None:
    line = words()
    assert "systemd.unit=kata-containers.target" in line
    assert line.count("systemd.mask=systemd-networkd.service") == 1
    assert line.count("systemd.mask=systemd-networkd.socket") == 1


def test_the_end_of_the_guest_is_the_end_of_qemu() -> None:
    assert {"panic=-1", "reboot=t"} <= set(words())


@pytest.mark.parametrize(
    ("fields", "present", "absent"),
    [
        ({"accel": "tcg", "tsc_khz": 2596134}, {"tsc_early_khz=2596134", "tsc=reliable"}, set[str]()),
        ({"accel": "tcg"}, {"no_timer_check"}, {"tsc=reliable"}),
        ({"accel": "kvm", "tsc_khz": 2596134}, set[str](), {"tsc_early_khz=2596134", "no_timer_check"}),
        ({"debug": True}, set[str](), {"quiet"}),
        ({"debug": False}, {"quiet"}, set[str]()),
        (
            {"log_vport": 1025, "ready_vport": 4},
            {"agent.log_vport=1025", "kata_py.ready_vport=4"},
            set[str](),
        ),
        ({"image": Path("/i")}, {"root=/dev/vda1", "rootfstype=ext4", "ro"}, set[str]()),
        (
            {"image": Path("/i"), "rootfs_type": "erofs"},
            {"rootflags=ro", "rootfstype=erofs"},
            {"rootflags=data=ordered,errors=remount-ro"},
        ),
        ({"initrd": Path("/i")}, set[str](), {"root=/dev/vda1", "ro"}),
    ],
)
def test_words_follow_the_specification(fields: dict[str, Any], present: set[str], absent: set[str]) -> None:
    line = set(words(**fields))
    assert present <= line
    assert not absent & line


def test_configured_parameters_come_last() -> None:
    assert words(kernel_params="agent.debug_console foo=bar")[-2:] == ["agent.debug_console", "foo=bar"]

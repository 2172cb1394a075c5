"""The decisions that depend on the host, for hosts that are folders."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from hypervisor.accel import AccelSetting, choose_accel, choose_vsock
from hypervisor.errors import HostUnsupported
from hypervisor.host import Host

if TYPE_CHECKING:
    from pathlib import Path

FLAGS_VMX = "fpu vme vmx sse2"
FLAGS_SVM = "fpu svm"
FLAGS_NEITHER = "fpu vmxe svme hypervisor"


def host(root: Path, *, flags: str = "", devices: tuple[str, ...] = (), arch: str = "x86_64") -> Host:
    for device in devices:
        path = root / device
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "proc").mkdir(exist_ok=True)
    second = "processor\t: 1\nflags\t\t: vmx svm only on the second\n"
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n{second}")
    return Host(root=root, arch=arch)


@pytest.mark.parametrize("flags", [FLAGS_VMX, FLAGS_SVM])
def test_auto_takes_kvm_that_can_run_a_guest(tmp_path: Path, flags: str) -> None:
    choice = choose_accel("auto", host=host(tmp_path, flags=flags, devices=("dev/kvm",)))
    assert (choice.value, choice.reason) == ("kvm", None)


@pytest.mark.parametrize(
    ("flags", "devices", "guest", "because"),
    [
        (FLAGS_VMX, (), None, "/dev/kvm: No such file"),
        (FLAGS_NEITHER, ("dev/kvm",), None, "neither vmx nor svm"),
        ("", ("dev/kvm",), None, "neither vmx nor svm"),
        (FLAGS_VMX, ("dev/kvm",), "aarch64", "the guest is aarch64, the host x86_64"),
    ],
)
def test_no_usable_kvm(
    tmp_path: Path, flags: str, devices: tuple[str, ...], guest: str | None, because: str
) -> None:
    view = host(tmp_path, flags=flags, devices=devices)
    choice = choose_accel("auto", guest_arch=guest, host=view)
    assert choice.value == "tcg"
    assert choice.reason is not None
    assert because in choice.reason
    assert "\n" not in choice.reason
    with pytest.raises(HostUnsupported, match='accel = "kvm" cannot work') as refused:
        choose_accel("kvm", guest_arch=guest, host=view)
    assert because in str(refused.value)
    assert 'set accel = "auto"' in str(refused.value)


def test_kvm_that_does_not_open_says_why(tmp_path: Path) -> None:
    view = host(tmp_path, flags=FLAGS_VMX)
    (tmp_path / "dev/kvm").mkdir(parents=True)  # opening a folder for writing fails for root too
    assert "Is a directory" in str(choose_accel("auto", host=view).reason)


def test_processor_flags_matter_on_x86_only(tmp_path: Path) -> None:
    view = host(tmp_path, devices=("dev/kvm",), arch="aarch64")
    assert choose_accel("auto", host=view).value == "kvm"


@pytest.mark.parametrize("setting", ["kvm", "tcg"])
def test_explicit_settings_that_work_need_no_reason(tmp_path: Path, setting: AccelSetting) -> None:
    view = host(tmp_path, flags=FLAGS_SVM, devices=("dev/kvm",))
    choice = choose_accel(setting, host=view)
    assert (choice.value, choice.reason) == (setting, None)


def test_missing_cpuinfo_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").touch()
    assert choose_accel("auto", host=Host(root=tmp_path, arch="x86_64")).value == "tcg"


def test_vsock_prefers_the_kernels(tmp_path: Path) -> None:
    choice = choose_vsock("auto", host=host(tmp_path, devices=("dev/vhost-vsock",)))
    assert (choice.value, choice.reason) == ("vhost", None)


def test_vsock_without_the_kernels(tmp_path: Path) -> None:
    view = host(tmp_path)
    choice = choose_vsock("auto", host=view)
    assert choice.value == "user"
    assert "/dev/vhost-vsock: No such file" in str(choice.reason)
    with pytest.raises(HostUnsupported, match="load the kernel module vhost_vsock"):
        choose_vsock("vhost", host=view)


def test_vsock_user_does_not_look_for_the_kernels(tmp_path: Path) -> None:
    choice = choose_vsock("user", host=host(tmp_path, devices=("dev/vhost-vsock",)))
    assert (choice.value, choice.reason) == ("user", None)


TSC = "constant_tsc nonstop_tsc"


@pytest.mark.parametrize(
    ("cpuinfo", "cpufreq", "khz"),
    [
        (f"flags : {TSC}\ncpu MHz : 2596.134\n", False, 2596134),
        (f"flags : {TSC}\ncpu MHz : 2596.134\n", True, None),  # a live frequency
        (f"flags : {TSC} aperfmperf\ncpu MHz : 3400.001\n", False, None),  # likewise
        ("flags : constant_tsc\ncpu MHz : 2596.134\n", False, None),
        (f"flags : {TSC}\n", False, None),
        (f"flags : {TSC}\ncpu MHz : unknown\n", False, None),
        ("", False, None),
    ],
)
def test_tsc_rate_is_told_only_when_certain(
    tmp_path: Path, cpuinfo: str, cpufreq: bool, khz: int | None
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    if cpufreq:
        (tmp_path / "sys/devices/system/cpu/cpu0/cpufreq").mkdir(parents=True)
    assert Host(root=tmp_path).tsc_khz() == khz


@pytest.mark.parametrize(
    ("error", "has"), [(errno.EFAULT, True), (errno.EPERM, False), (errno.ENOSYS, False)]
)
def test_io_uring_is_asked_for(monkeypatch: pytest.MonkeyPatch, error: int, has: bool) -> None:
    """The kernel, an administrator or a seccomp filter answers; the call itself does nothing in any case."""
    monkeypatch.setattr(ctypes, "get_errno", lambda: error)
    assert Host().has_io_uring() is has

"""Each requirement of a host: found, missing, and what is proposed then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest
from msgspec.structs import replace

from cli import host_check
from cli.host_check import Level
from config import Config, Qemu
from config.schema import Runtime
from hypervisor.accel import Choice
from hypervisor.arch import MACHINES
from hypervisor.errors import HostUnsupported
from hypervisor.host import Host
from hypervisor.qemu.capabilities import Capabilities
from shim import steering
from tests.support.fake_sysfs import FakeSysfs
from tests.unit.hypervisor.test_confidential import TDX
from tests.unit.hypervisor.test_confidential import host as host_with

MachineType = Literal["q35", "virt", "s390-ccw-virtio"]


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def of_version(*version: int, types: frozenset[str] = frozenset()) -> Capabilities:
    major, minor, micro = version
    return Capabilities(
        (major, minor, micro), types, frozenset({"q35", "virt", "s390-ccw-virtio"}), frozenset()
    )


@pytest.mark.parametrize(
    ("version", "level"),
    [((7, 2, 0), Level.OK), ((10, 0, 2), Level.OK), ((7, 1, 9), Level.WARNING), ((5, 0, 0), Level.WARNING)],
)
def test_qemu_versions(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], level: Level) -> None:
    async def answer(qemu: Path, run_dir: Path) -> Capabilities:
        return of_version(*version)

    monkeypatch.setattr(host_check, "capabilities", answer)
    (finding,), has = host_check.qemu_program("/qemu", "x86_64")
    assert finding.level is level
    assert finding.detail.startswith(".".join(map(str, version)) + " at /qemu")
    assert has == of_version(*version)


def test_a_qemu_that_is_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(qemu: Path, run_dir: Path) -> Capabilities:
        raise HostUnsupported("QEMU 4.2.0 is too old; install a newer one")

    monkeypatch.setattr(host_check, "capabilities", answer)
    (finding,), has = host_check.qemu_program("/qemu", "x86_64")
    assert (finding.level, finding.detail, finding.remedy) == (
        Level.MISSING,
        "QEMU 4.2.0 is too old",
        "install a newer one",
    )
    assert has is None


@pytest.mark.parametrize("text", ["exit 1", "kill $$"])
def test_broken_qemu_is_missing(tmp_path: Path, text: str) -> None:
    (finding,), has = host_check.qemu_program(program(tmp_path / "qemu", text), "x86_64")
    assert finding.level is Level.MISSING
    assert "apt-get install" in finding.remedy
    assert has is None


def test_absent_qemu_is_missing(tmp_path: Path) -> None:
    (finding,), _ = host_check.qemu_program(str(tmp_path / "absent"), "x86_64")
    assert (finding.level, finding.detail) == (Level.MISSING, f"{tmp_path}/absent does not run")


@pytest.mark.parametrize(
    ("guest_arch", "package"),
    [("x86_64", "qemu-system-x86"), ("aarch64", "qemu-system-arm"), ("s390x", "qemu-system-s390x")],
)
def test_the_package_is_that_of_the_guests_architecture(
    tmp_path: Path, guest_arch: str, package: str
) -> None:
    (finding,), _ = host_check.qemu_program(str(tmp_path / "absent"), guest_arch)
    assert f"{package}, or set" in finding.remedy


@pytest.mark.parametrize("machine_type", ["q35", "virt", "s390-ccw-virtio"])
def test_acceleration_is_for_the_guests_architecture(
    monkeypatch: pytest.MonkeyPatch, machine_type: MachineType
) -> None:
    monkeypatch.setattr(Host, "why_not_openable", lambda self, path: None)
    monkeypatch.setattr(Host, "cpu_flags", lambda self: frozenset({"vmx"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (finding,) = host_check.acceleration(replace(Qemu(), machine_type=machine_type))
    foreign = f"the guest is {MACHINES[machine_type]}, the host x86_64" in finding.detail
    assert (finding.level is Level.WARNING, foreign) == ((machine_type != "q35"),) * 2


@pytest.mark.parametrize(
    ("machine_type", "shared_fs"),
    [("q35", "vhost-user-fs-pci"), ("virt", "vhost-user-fs-pci"), ("s390-ccw-virtio", "virtio-9p-ccw")],
)
def test_what_qemu_would_be_told_and_has_not(
    machine_type: MachineType, shared_fs: str, tmp_path: Path
) -> None:
    qemu = replace(
        Qemu(), machine_type=machine_type, virtio_fs_daemon="/virtiofsd", vsock="user", accel="tcg"
    )
    config = replace(Config(), hypervisor=qemu)
    found = {finding.detail: finding for finding in host_check.command_line(config, of_version(7, 2, 0))}
    finding = found[f"has no device {shared_fs}"]
    assert (finding.level, finding.remedy) == (Level.MISSING, "install the distribution's full QEMU")
    every = frozenset(detail.rpartition(" ")[2] for detail in found)
    assert host_check.command_line(config, of_version(7, 2, 0, types=every)) == []


def test_a_machine_that_cannot_be_is_missing() -> None:
    qemu = replace(Qemu(), pcie_root_port=4, pcie_switch_port=4, accel="tcg", vsock="user")
    (finding,) = host_check.command_line(replace(Config(), hypervisor=qemu), of_version(7, 2, 0))
    assert finding.level is Level.MISSING
    assert finding.remedy.startswith("set one of pcie_root_port")


def test_emulation_is_a_warning_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_check, "choose_accel", lambda setting, **_: Choice("tcg", "no KVM here"))
    (finding,) = host_check.acceleration(Qemu())
    assert (finding.level, finding.detail) == (Level.WARNING, "no KVM here")


def test_impossible_setting_is_missing_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(setting: str, *, guest_arch: str) -> Choice[str]:
        raise HostUnsupported(f'accel = "{setting}" cannot work: no device; load the module')

    monkeypatch.setattr(host_check, "choose_accel", refuse)
    (finding,) = host_check.acceleration(replace(Qemu(), accel="kvm"))
    assert finding.level is Level.MISSING
    assert finding.detail == 'accel = "kvm" cannot work: no device'
    assert finding.remedy == "load the module"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try to open files as another user")
def test_what_rootless_qemu_could_not_open_is_missing(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").touch(mode=0o600)
    qemu = replace(
        Qemu(), rootless=True, kernel=str(tmp_path / "vmlinux"), path="/bin/true", accel="tcg", vsock="user"
    )
    (finding,) = host_check.command_line(replace(Config(), hypervisor=qemu), of_version(7, 2, 0))
    assert finding.level is Level.MISSING
    assert finding.detail == f"QEMU cannot read {tmp_path}/vmlinux as another user than root"
    assert finding.remedy.startswith("open it and its folders")


def test_what_a_choice_already_says_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(qemu: Path, run_dir: Path) -> Capabilities:
        return of_version(7, 2, 0)

    monkeypatch.setattr(host_check, "capabilities", answer)
    monkeypatch.setattr(Host, "why_not_openable", lambda self, path: "no such thing")
    for name in ("qemu", "vmlinux", "initrd", "virtiofsd"):
        program(tmp_path / name, "")
    path = tmp_path / "configuration.toml"
    lines = [
        f'{key} = "{tmp_path}/{name}"'
        for key, name in (
            ("path", "qemu"),
            ("kernel", "vmlinux"),
            ("initrd", "initrd"),
            ("virtio_fs_daemon", "virtiofsd"),
        )
    ]
    path.write_text("\n".join(["[hypervisor.qemu]", *lines, 'accel = "kvm"', 'vsock = "user"', ""]))
    found = [finding for finding in host_check.check(path) if "cannot work" in finding.detail]
    assert [finding.subject for finding in found] == ["acceleration"]


@pytest.mark.parametrize(("reason", "level"), [("no vhost-vsock", Level.NOTE), (None, Level.OK)])
def test_vsock(monkeypatch: pytest.MonkeyPatch, reason: str | None, level: Level) -> None:
    monkeypatch.setattr(host_check, "choose_vsock", lambda setting: Choice("user", reason))
    (finding,) = host_check.vsock(Qemu())
    assert (finding.level, finding.detail) == (level, reason or "user")


@pytest.mark.parametrize(
    ("devices", "model", "level", "detail"),
    [
        ([], "tcfilter", Level.MISSING, "/dev/net/tun: No such file or directory"),
        ([], "none", Level.NOTE, "guests get none: internetworking_model is none"),
        (["net/tun"], "tcfilter", Level.OK, "packets are carried by QEMU"),
        (["net/tun", "vhost-net"], "tcfilter", Level.OK, "packets are carried by the kernel (vhost-net)"),
    ],
)
def test_network(
    tmp_path: Path, devices: list[str], model: Literal["tcfilter", "none"], level: Level, detail: str
) -> None:
    for device in devices:
        (tmp_path / "dev" / device).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / device).touch()
    runtime = Runtime(internetworking_model=model)
    (finding,) = host_check.network(runtime, Qemu(), Host(root=tmp_path))
    assert (finding.level, finding.detail) == (level, detail)
    assert bool(finding.remedy) == (level is Level.MISSING)


def test_a_kernel_that_leads_no_ports_to_guests_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "why_not", lambda: "bpf: Invalid argument")
    (finding,) = host_check.port_forward()
    assert (finding.level, finding.detail) == (
        Level.NOTE,
        "kubectl port-forward reaches no guest: bpf: Invalid argument",
    )
    assert "CONFIG_BPF_SYSCALL" in finding.remedy
    monkeypatch.setattr(steering, "why_not", lambda: "")
    (finding,) = host_check.port_forward()
    assert (finding.level, finding.remedy) == (Level.OK, "")


def test_confidential_guests_are_told_all_that_lacks(tmp_path: Path) -> None:
    qemu = replace(Qemu(), confidential_guest=True, machine_type="q35")
    findings = host_check.protection(qemu, tmp_path)
    assert [(finding.subject, finding.level) for finding in findings] == [
        ("acceleration", Level.MISSING), ("vsock", Level.MISSING), ("protection", Level.MISSING),
    ]  # fmt: skip
    assert all(finding.remedy and "; " not in finding.detail for finding in findings)


def test_confidential_guests_on_a_host_for_them(tmp_path: Path) -> None:
    host_with(tmp_path, {"dev/kvm": "", "dev/vhost-vsock": "", TDX: "Y\n", "proc/cpuinfo": "flags : vmx\n"})
    qemu = replace(Qemu(), confidential_guest=True, machine_type="q35")
    found = host_check.protection(qemu, tmp_path)
    details = [finding.detail for finding in found if finding.level is Level.OK]
    assert details[-2:] == ["vhost", "tdx"]


def test_sharing(tmp_path: Path) -> None:
    daemon = program(tmp_path / "virtiofsd", "")
    qemu = replace(Qemu(), virtio_fs_daemon=daemon)
    assert [finding.level for finding in host_check.sharing(qemu)] == [Level.OK]
    Path(daemon).unlink()
    (finding,) = host_check.sharing(qemu)
    assert (finding.level, finding.detail) == (Level.MISSING, f"not at {daemon}")
    (finding,) = host_check.sharing(replace(qemu, shared_fs="none"))
    assert finding.level is Level.NOTE


def test_guest_files(tmp_path: Path) -> None:
    qemu = replace(Qemu(), kernel=str(tmp_path / "vmlinux"), initrd=str(tmp_path / "initrd.img"))
    (tmp_path / "vmlinux").touch()
    (finding,) = host_check.guest(qemu)
    assert (finding.level, finding.detail) == (Level.MISSING, f"not there: {tmp_path}/initrd.img")
    (tmp_path / "initrd.img").touch()
    (finding,) = host_check.guest(qemu)  # a guest of another maker: no manifest
    assert (finding.level, finding.remedy) == (Level.OK, "")


@pytest.mark.parametrize(
    ("entries", "level", "words"),
    [
        (["cgroup.controllers"], Level.OK, "version 2"),
        (["memory/", "unified/"], Level.OK, "version 1 with an additional version 2 tree"),
        (["memory/"], Level.OK, "version 1"),
        ([], Level.MISSING, "not mounted"),
    ],
)
def test_control_groups(tmp_path: Path, entries: list[str], level: Level, words: str) -> None:
    base = tmp_path / "sys/fs/cgroup"
    base.mkdir(parents=True)
    for entry in entries:
        (base / entry).mkdir() if entry.endswith("/") else (base / entry).touch()
    (finding,) = host_check.control_groups(tmp_path)
    assert finding.level is level
    assert finding.detail.startswith(words)


def test_containerd_and_the_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.level for finding in host_check.containerd()] == [Level.MISSING]
    program(tmp_path / "containerd", "echo containerd github.com/containerd/containerd 1.6.20 abc")
    found = host_check.containerd()
    assert [(finding.subject, finding.level) for finding in found] == [
        ("containerd", Level.OK),
        ("shim", Level.WARNING),
    ]
    assert found[0].detail == "1.6.20"
    program(tmp_path / host_check.SHIM, "")
    assert [finding.level for finding in host_check.containerd()] == [Level.OK, Level.OK]


def test_problems_of_the_configuration_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(
        f'[hypervisor.qemu]\npath = "{tmp_path}/no-qemu"\nkernel = "{tmp_path}/no-kernel"\n'
        f'initrd = "{tmp_path}/no-initrd"\nvirtio_fs_daemon = "{tmp_path}/no-virtiofsd"\n'
    )
    findings = host_check.check(path)
    for name in ("no-qemu", "no-kernel", "no-initrd", "no-virtiofsd"):
        assert [finding.subject for finding in findings if name in finding.detail] == ["configuration"]
    assert host_check.unusable(findings)
    assert not {"QEMU", "guest", "virtiofsd"} & {finding.subject for finding in findings}


def test_others_than_root_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert [finding.level for finding in host_check.user()] == [Level.WARNING]
    assert not host_check.unusable(host_check.user())


@pytest.mark.parametrize(
    ("release", "level"),
    [("6.1.0-56-cloud-amd64", None), ("5.12", None), ("5.10.0-30-amd64", Level.MISSING), ("4.18.0", Level.MISSING),
     ("unknown", None)],
)  # fmt: skip
def test_kernel(release: str, level: Level | None) -> None:
    assert [finding.level for finding in host_check.kernel(release)] == ([level] if level else [])


@pytest.mark.parametrize("emulator", [True, False])
def test_guests_of_other_architectures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulator: bool
) -> None:
    (tmp_path / "arm64").mkdir()
    (tmp_path / "arm64" / "manifest.json").touch()
    program = tmp_path / "emulator"
    if emulator:
        program.touch(mode=0o755)
    monkeypatch.setattr(host_check, "DEFAULT_QEMUS", {"virt": str(program)})
    found = host_check.other_guests(replace(Qemu(), guest_dir=str(tmp_path)))
    said = [(finding.level, "qemu-system-arm" in finding.remedy) for finding in found]
    assert said == [(Level.OK, False) if emulator else (Level.WARNING, True)]
    # The configured machine's own guest is looked at elsewhere.
    assert host_check.other_guests(replace(Qemu(), guest_dir=str(tmp_path), machine_type="virt")) == []


def test_devices_of_the_host_that_no_guest_is_given(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    sysfs.pci("0000:3b:00.0", "12")
    (finding,) = host_check.host_devices(Runtime(), Qemu(), sysfs.host)
    assert (finding.level, finding.remedy) == (Level.NOTE, "")
    assert finding.detail.endswith("this host has 1 IOMMU groups, vfio-pci not loaded, no IOMMUFD")


def test_devices_of_the_host_that_are_ready(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    sysfs.pci("0000:3b:00.0", "12")
    sysfs.own_file("0000:3b:00.0", "vfio0")
    sysfs.pci("0000:3c:00.0", "2", driver="nvme")
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    (finding,) = host_check.host_devices(Runtime(), Qemu(hot_plug_vfio="root-port"), sysfs.host)
    assert (finding.level, finding.detail) == (Level.OK, "ready: 0000:3b:00.0; IOMMUFD")


def test_what_a_host_lacks_to_give_devices_away(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    runtime = Runtime(vfio_mode="vfio", pod_resource_api_sock="/run/kubelet.sock")
    qemu = Qemu(cold_plug_vfio="root-port", confidential_guest=True)
    findings = host_check.host_devices(runtime, qemu, sysfs.host)
    assert {finding.level for finding in findings} == {Level.WARNING}
    assert [finding.remedy for finding in findings] == [
        "enable the IOMMU in firmware and kernel (intel_iommu=on)",
        "modprobe vfio-pci",
        "modprobe iommufd, on Linux 6.6 or later",
        "set enable_iommu = true",
        "correct pod_resource_api_sock, or start the kubelet",
    ]
    sysfs.pci("0000:3c:00.0", "2", driver="nvme")
    *_, last = host_check.host_devices(Runtime(), Qemu(hot_plug_vfio="root-port"), sysfs.host)
    assert last.detail == "none of 1 IOMMU groups is bound to vfio-pci"
    assert last.remedy.startswith("driverctl set-override ADDRESS vfio-pci binds a device")

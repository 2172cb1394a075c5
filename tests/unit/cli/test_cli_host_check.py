"""Each requirement of a host: found, missing, and what is proposed then."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from cli import host_check
from cli.host_check import Level
from config import Qemu
from hypervisor.accel import Choice
from hypervisor.errors import HostUnsupported

DEVICES = frozenset({host_check.SHARING_DEVICE, *host_check.VSOCK_DEVICES.values()})


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def qemu_program(folder: Path, version: str) -> str:
    return program(
        folder / "qemu",
        f'case $1 in --version) echo "QEMU emulator version {version}";; *) echo \'name "a-pci", bus PCI\';; esac',
    )


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("7.2.22 (Debian 1:7.2+dfsg-7)", Level.OK),
        ("10.0.2", Level.OK),
        ("7.1.0", Level.WARNING),
        ("6.2.0", Level.WARNING),
        ("unknown", Level.WARNING),
    ],
)
def test_qemu_versions(tmp_path: Path, version: str, level: Level) -> None:
    (finding,), devices = host_check.qemu_program(qemu_program(tmp_path, version))
    assert finding.level is level
    assert devices == {"a-pci"}


@pytest.mark.parametrize("text", ["exit 1", "kill $$"])
def test_broken_qemu_is_missing(tmp_path: Path, text: str) -> None:
    (finding,), devices = host_check.qemu_program(program(tmp_path / "qemu", text))
    assert finding.level is Level.MISSING
    assert "apt-get install" in finding.remedy
    assert devices == frozenset()


def test_absent_qemu_is_missing(tmp_path: Path) -> None:
    (finding,), _ = host_check.qemu_program(str(tmp_path / "absent"))
    assert (finding.level, finding.detail) == (Level.MISSING, f"{tmp_path}/absent does not run")


def test_emulation_is_a_warning_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_check, "choose_accel", lambda setting: Choice("tcg", "no KVM here"))
    (finding,) = host_check.acceleration(Qemu())
    assert (finding.level, finding.detail) == (Level.WARNING, "no KVM here")


def test_impossible_setting_is_missing_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(setting: str) -> Choice[str]:
        raise HostUnsupported(f'accel = "{setting}" cannot work: no device; load the module')

    monkeypatch.setattr(host_check, "choose_accel", refuse)
    (finding,) = host_check.acceleration(replace(Qemu(), accel="kvm"))
    assert finding.level is Level.MISSING
    assert finding.detail == 'accel = "kvm" cannot work: no device'
    assert finding.remedy == "load the module"


@pytest.mark.parametrize(
    ("devices", "levels"),
    [
        (DEVICES, [Level.NOTE]),
        (DEVICES - {"vhost-user-vsock-pci"}, [Level.MISSING]),
        (frozenset[str](), [Level.NOTE]),  # QEMU does not run: reported elsewhere
    ],
)
def test_vsock_needs_its_device(
    monkeypatch: pytest.MonkeyPatch, devices: frozenset[str], levels: list[Level]
) -> None:
    monkeypatch.setattr(host_check, "choose_vsock", lambda setting: Choice("user", "no vhost-vsock"))
    assert [finding.level for finding in host_check.vsock(Qemu(), devices)] == levels


def test_sharing(tmp_path: Path) -> None:
    daemon = program(tmp_path / "virtiofsd", "")
    qemu = replace(Qemu(), virtio_fs_daemon=daemon)
    assert [finding.level for finding in host_check.sharing(qemu, DEVICES)] == [Level.OK]
    assert [finding.level for finding in host_check.sharing(qemu, frozenset({"x"}))] == [Level.MISSING]
    Path(daemon).unlink()
    (finding,) = host_check.sharing(qemu, DEVICES)
    assert (finding.level, finding.detail) == (Level.MISSING, f"not at {daemon}")
    (finding,) = host_check.sharing(replace(qemu, shared_fs="none"), DEVICES)
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

"""Whether a host can run containers with kata-py: every requirement looked at, nothing changed.

Each check gives findings; a finding that is not fine carries the step that makes it fine. The same functions
that the shim uses decide about acceleration, vsock and configuration, so the answer here is the answer
there.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.guest import MANIFEST, summary
from config import ConfigError, LoadedConfig, Qemu, load
from guest_image import ImageError, Manifest
from hypervisor.accel import choose_accel, choose_vsock
from hypervisor.errors import HostUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHIM = "containerd-shim-kata-py-v2"
# The oldest that the tests run with; older ones may do.
TESTED_QEMU = (7, 2)
# Devices that distributions leave out of some builds of QEMU.
SHARING_DEVICE = "vhost-user-fs-pci"
VSOCK_DEVICES = {"user": "vhost-user-vsock-pci", "vhost": "vhost-vsock-pci"}
PROGRAM_TIMEOUT_S = 20.0


class Level(enum.Enum):
    """How a finding matters. Only `missing` keeps containers from running."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is the next step, empty when there is nothing to do."""

    subject: str
    level: Level
    detail: str
    remedy: str = ""


def check(file: Path | None = None, *, root: Path = Path("/")) -> list[Finding]:
    """All findings for the given or installed configuration. `root` is where /sys is looked for."""
    findings, loaded, broken = configuration(file)
    # Without a usable configuration the rest is judged for the defaults, which is what most of it would be.
    # What the configuration's own findings are about is left to them.
    qemu = loaded.config.hypervisor if loaded else Qemu()
    emulator, devices = ([], frozenset[str]()) if "path" in broken else qemu_program(qemu.path)
    return [
        *user(),
        *findings,
        *emulator,
        *acceleration(qemu),
        *vsock(qemu, devices),
        *([] if "virtio_fs_daemon" in broken else sharing(qemu, devices)),
        *(guest(qemu) if loaded else []),
        *control_groups(root),
        *containerd(),
    ]


def unusable(findings: Iterable[Finding]) -> bool:
    """Whether something required is missing."""
    return any(finding.level is Level.MISSING for finding in findings)


def user() -> list[Finding]:
    """Shims inherit containerd's user, and that has to be root."""
    if os.geteuid() == 0:
        return []
    return [
        Finding(
            "user", Level.WARNING, "not root: devices may look closed that are open to containerd", "use sudo"
        )
    ]


def configuration(file: Path | None) -> tuple[list[Finding], LoadedConfig | None, frozenset[str]]:
    """Loads it as the shim does. Problems and warnings are findings; the last value is the keys at fault."""
    subject = "configuration"
    try:
        loaded = load(file)
    except ConfigError as error:
        findings = [
            Finding(subject, Level.MISSING, str(problem._replace(hint="")), problem.hint)
            for problem in error.problems
        ]
        return findings, None, frozenset(problem.key.rpartition(".")[2] for problem in error.problems)
    place = Finding(subject, Level.OK, str(loaded.path or "built-in defaults"))
    notes = [Finding(subject, Level.NOTE, warning) for warning in loaded.warnings]
    return [place, *notes], loaded, frozenset()


def said_by(argv: Sequence[str]) -> str | None:
    """What a program prints; None when it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def qemu_program(path: str) -> tuple[list[Finding], frozenset[str]]:
    """QEMU's presence and version, and the devices that this build has."""
    text = said_by([path, "--version"])
    if text is None:
        remedy = "apt-get install --no-install-recommends qemu-system-x86, or set `path` in [hypervisor.qemu]"
        return [Finding("QEMU", Level.MISSING, f"{path} does not run", remedy)], frozenset()
    devices = frozenset(re.findall(r'name "([^"]+)"', said_by([path, "-device", "help"]) or ""))
    match = re.search(r"version (\d+)\.(\d+)(\S*)", text)
    if match is None:
        return [Finding("QEMU", Level.WARNING, f"{path} does not tell its version")], devices
    detail = f"{match[1]}.{match[2]}{match[3]} at {path}"
    if (int(match[1]), int(match[2])) < TESTED_QEMU:
        tested = ".".join(map(str, TESTED_QEMU))
        return [
            Finding("QEMU", Level.WARNING, f"{detail} is older than what is tested", f"use {tested} or later")
        ], devices
    return [Finding("QEMU", Level.OK, detail)], devices


def acceleration(qemu: Qemu) -> list[Finding]:
    """KVM or emulation, decided as for a sandbox."""
    try:
        choice = choose_accel(qemu.accel)
    except HostUnsupported as error:
        return [Finding("acceleration", Level.MISSING, *_split(error))]
    level = Level.WARNING if choice.reason else Level.OK
    return [Finding("acceleration", level, choice.reason or choice.value)]


def vsock(qemu: Qemu, devices: frozenset[str]) -> list[Finding]:
    """Who carries the sockets between host and guest, and whether this QEMU has the device for it."""
    try:
        choice = choose_vsock(qemu.vsock)
    except HostUnsupported as error:
        return [Finding("vsock", Level.MISSING, *_split(error))]
    missing = _without_device(VSOCK_DEVICES[choice.value], devices)
    level = Level.NOTE if choice.reason else Level.OK
    return missing or [Finding("vsock", level, choice.reason or choice.value)]


def sharing(qemu: Qemu, devices: frozenset[str]) -> list[Finding]:
    """How the containers' files get into the guest."""
    if qemu.shared_fs == "none":
        return [Finding("virtiofsd", Level.NOTE, 'not used: shared_fs = "none"')]
    found = next((path for path in virtiofsd_places(qemu) if os.access(path, os.X_OK)), None)
    if found is None:
        remedy = "apt-get install virtiofsd (Debian 12: it comes with qemu-system-x86)"
        return [Finding("virtiofsd", Level.MISSING, "not at " + " or ".join(virtiofsd_places(qemu)), remedy)]
    return _without_device(SHARING_DEVICE, devices) or [Finding("virtiofsd", Level.OK, found)]


def virtiofsd_places(qemu: Qemu) -> tuple[str, ...]:
    """The configured place, or the usual ones when the key is empty or the configuration unusable."""
    return (
        (qemu.virtio_fs_daemon,)
        if qemu.virtio_fs_daemon
        else ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
    )


def _without_device(device: str, devices: frozenset[str]) -> list[Finding]:
    # No list at all means that QEMU itself does not run, which is a finding of its own.
    if not devices or device in devices:
        return []
    return [
        Finding("QEMU", Level.MISSING, f"this build has no {device}", "install the distribution's full QEMU")
    ]


def _split(error: HostUnsupported) -> tuple[str, str]:
    problem, _, remedy = str(error).partition("; ")
    return problem, remedy


def guest(qemu: Qemu) -> list[Finding]:
    """The kernel and what it boots into. A guest of another maker has no manifest, which is fine."""
    files = [Path(name) for name in (qemu.kernel, qemu.initrd, qemu.image) if name]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        return [Finding("guest", Level.MISSING, f"not there: {', '.join(missing)}", "kata-py guest build")]
    try:
        manifest = Manifest.read(files[0].with_name(MANIFEST))
    except ImageError:
        return [Finding("guest", Level.OK, ", ".join(map(str, files)))]
    return [Finding("guest", Level.OK, f"{summary(manifest)}, at {files[0].parent}")]


def control_groups(root: Path) -> list[Finding]:
    """Which version of control groups the host uses."""
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").exists():
        return [Finding("control groups", Level.OK, "version 2")]
    if (base / "memory").is_dir():
        both = " with an additional version 2 tree" if (base / "unified").is_dir() else ""
        return [Finding("control groups", Level.OK, f"version 1{both}")]
    return [
        Finding(
            "control groups", Level.MISSING, f"not mounted at {base}", "mount -t cgroup2 none /sys/fs/cgroup"
        )
    ]


def containerd() -> list[Finding]:
    """containerd's version, and whether it would find the shim where this program's PATH leads."""
    text = said_by(["containerd", "--version"])
    if text is None:
        return [Finding("containerd", Level.MISSING, "not in PATH", "apt-get install containerd")]
    words = text.split()
    found = [Finding("containerd", Level.OK, words[2] if len(words) > 2 else text.strip())]
    shim = shutil.which(SHIM)
    if shim is None:
        remedy = "`make install` puts it into /usr/local/bin, which containerd normally has in its PATH"
        return [*found, Finding("shim", Level.WARNING, f"{SHIM} is not in PATH", remedy)]
    return [*found, Finding("shim", Level.OK, shim)]

"""Whether a host can run containers with kata-py: every requirement looked at, nothing changed.

Each check gives findings; a finding that is not fine carries the step that makes it fine. The same functions
that the shim uses decide about acceleration, vsock and configuration, so the answer here is the answer
there.
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from structlog.testing import capture_logs

from cli.guest import MANIFEST, summary
from config import ConfigError, LoadedConfig, Qemu, load
from config.schema import Runtime
from config.schema.hypervisor import ARCHITECTURES, DEFAULT_QEMUS, QEMU_PACKAGES
from guest_image import ImageError, Manifest
from hypervisor import rootless
from hypervisor.accel import choose_accel, choose_vsock
from hypervisor.arch import arch_of_machine
from hypervisor.errors import DeviceUnavailable, HostUnsupported, HypervisorError, InvalidSpec
from hypervisor.host import Host
from hypervisor.qemu.capabilities import capabilities, lacks
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.vfio import devices_named, has_iommufd
from shim import steering
from shim.plan import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from config import Config
    from hypervisor.qemu.capabilities import Capabilities

SHIM = "containerd-shim-kata-py-v2"
# The first with mount_setattr(2).
OLDEST_KERNEL = (5, 12)
# The oldest that the tests run with; older ones may do.
TESTED_QEMU = (7, 2)
# By the guests' architecture; in Debian 12 that of s390x is a name for qemu-system-misc.
PACKAGES = {arch_of_machine(machine): package for machine, package in QEMU_PACKAGES.items()}
INSTALL = "apt-get install --no-install-recommends"
PROGRAM_TIMEOUT_S = 20.0
_BIND_HINT = (
    "driverctl set-override ADDRESS vfio-pci binds a device; a group is ready when all of it is bound"
)


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
    emulator, has = ([], None) if "path" in broken else qemu_program(qemu.path, arch(qemu))
    choices = protection(qemu, root) if qemu.confidential_guest else [*acceleration(qemu), *vsock(qemu)]
    return [
        *user(),
        *kernel(os.uname().release),
        *findings,
        *emulator,
        *_without(choices, command_line(loaded.config, has) if loaded and has else []),
        *choices,
        *([] if "virtio_fs_daemon" in broken else sharing(qemu)),
        *network(loaded.config.runtime if loaded else Runtime(), qemu, Host(root=root)),
        *port_forward(),
        *host_devices(loaded.config.runtime if loaded else Runtime(), qemu, Host(root=root)),
        *(guest(qemu) if loaded else []),
        *other_guests(qemu),
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


def kernel(release: str) -> list[Finding]:
    """Volumes are mounted with mount_setattr(2)."""
    number = re.match(r"(\d+)\.(\d+)", release)
    if number is None or tuple(map(int, number.groups())) >= OLDEST_KERNEL:
        return []
    oldest = ".".join(map(str, OLDEST_KERNEL))
    return [
        Finding("kernel", Level.MISSING, f"Linux {release} is older than {oldest}", "install a newer kernel")
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


def arch(qemu: Qemu) -> str:
    """The guests' architecture, which the machine decides."""
    return arch_of_machine(qemu.machine_type)


def qemu_program(path: str, guest_arch: str) -> tuple[list[Finding], Capabilities | None]:
    """QEMU's presence and version, and what else it says of itself."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            has = asyncio.run(capabilities(Path(path), Path(folder)))
    except HostUnsupported as error:
        return [Finding("QEMU", Level.MISSING, *_split(error))], None
    except HypervisorError:
        remedy = f"{INSTALL} {PACKAGES[guest_arch]}, or set `path` in [hypervisor.qemu]"
        return [Finding("QEMU", Level.MISSING, f"{path} does not run", remedy)], None
    detail = f"{has.release} at {path}"
    if has.version < TESTED_QEMU:
        tested = ".".join(map(str, TESTED_QEMU))
        remedy = f"use {tested} or later"
        return [Finding("QEMU", Level.WARNING, f"{detail} is older than what is tested", remedy)], has
    return [Finding("QEMU", Level.OK, detail)], has


def command_line(config: Config, has: Capabilities) -> list[Finding]:
    """Whether QEMU has all that it would be told about, and with `rootless` can open it."""
    try:
        with capture_logs():  # what the shim would log about its choices, other findings say
            spec = plan(config, "check", exported=Path("/"))
        fds = Fds(qmp=3, console=4, vsock=5, guest_cid=3, shares=tuple(6 for _ in spec.shares), initdata=7)
        argv = build_cmdline(spec, fds)
        if spec.user is not None and os.geteuid() == 0:
            asyncio.run(rootless.check(spec, spec.user))
    except (HostUnsupported, InvalidSpec) as error:
        return [Finding("QEMU", Level.MISSING, *_split(error))]
    except (HypervisorError, OSError):  # of the host or the guest's files: others look at these
        return []
    return [Finding("QEMU", Level.MISSING, f"has no {what}", remedy) for what, remedy in lacks(argv, has)]


def acceleration(qemu: Qemu) -> list[Finding]:
    """KVM or emulation, decided as for a sandbox."""
    try:
        choice = choose_accel(qemu.accel, guest_arch=arch(qemu))
    except HostUnsupported as error:
        return [Finding("acceleration", Level.MISSING, *_split(error))]
    level = Level.WARNING if choice.reason else Level.OK
    return [Finding("acceleration", level, choice.reason or choice.value)]


def vsock(qemu: Qemu) -> list[Finding]:
    """Who carries the sockets between host and guest."""
    try:
        choice = choose_vsock(qemu.vsock)
    except HostUnsupported as error:
        return [Finding("vsock", Level.MISSING, *_split(error))]
    return [Finding("vsock", Level.NOTE if choice.reason else Level.OK, choice.reason or choice.value)]


def network(runtime: Runtime, qemu: Qemu, host: Host) -> list[Finding]:
    """How a guest gets the interfaces of its pod."""
    if runtime.internetworking_model == "none":
        return [Finding("network", Level.NOTE, "guests get none: internetworking_model is none")]
    if problem := host.why_not_openable("dev/net/tun"):
        remedy = "load the kernel module tun, or set internetworking_model to none"
        return [Finding("network", Level.MISSING, f"/dev/net/tun: {problem}", remedy)]
    fast = not qemu.disable_vhost_net and host.why_not_openable("dev/vhost-net") is None
    return [
        Finding("network", Level.OK, f"packets are carried by {'the kernel (vhost-net)' if fast else 'QEMU'}")
    ]


def port_forward() -> list[Finding]:
    """Whether the ports of guests are reached on the host, as `kubectl port-forward` wants it."""
    problem = steering.why_not()
    if not problem:
        return [Finding("port-forward", Level.OK, "reaches guests")]
    detail = f"kubectl port-forward reaches no guest: {problem}"
    remedy = "run this as root, with a kernel from 5.9 on that has CONFIG_BPF_SYSCALL and CONFIG_INET"
    return [Finding("port-forward", Level.NOTE, detail, remedy)]


def host_devices(runtime: Runtime, qemu: Qemu, host: Host) -> list[Finding]:
    """Whether guests can be given devices of this host (VFIO), and which are ready for that. Containers that ask for
    none run in any case.
    """
    subject, on_channels = "host devices", arch(qemu) == "s390x"
    groups = sorted(_listed(host, "sys/kernel/iommu_groups"), key=int)
    drivable = (host.root / "sys/bus/pci/drivers/vfio-pci").exists()
    if qemu.cold_plug_vfio == qemu.hot_plug_vfio == "no-port":
        has = f"{len(groups)} IOMMU groups, vfio-pci {'' if drivable else 'not '}loaded, {_opened_by(host)}"
        detail = f"no guest is given any: cold_plug_vfio and hot_plug_vfio are no-port; this host has {has}"
        return [Finding(subject, Level.NOTE, detail)]
    lacks: list[tuple[str, str]] = []
    if not groups:
        lacks.append(
            ("this host has no IOMMU groups", "enable the IOMMU in firmware and kernel (intel_iommu=on)")
        )
    if not drivable and not on_channels:
        lacks.append(("the driver vfio-pci is not loaded", "modprobe vfio-pci"))
    if qemu.confidential_guest and not has_iommufd(host):
        what = "confidential guests are given devices through /dev/iommu, which is not there"
        lacks.append((what, "modprobe iommufd, on Linux 6.6 or later"))
    if runtime.vfio_mode == "vfio" and not qemu.enable_iommu and not on_channels:
        what = "vfio_mode is vfio, but containers cannot drive PCI devices in guests without an IOMMU"
        lacks.append((what, "set enable_iommu = true"))
    if (sock := runtime.pod_resource_api_sock) and not (host.root / sock.lstrip("/")).exists():
        lacks.append((f"there is no socket {sock}", "correct pod_resource_api_sock, or start the kubelet"))
    ready: list[str] = []
    for group in groups:
        with suppress(DeviceUnavailable):  # most are the host's own
            ready += [device.address for device in devices_named(f"/dev/vfio/{group}", host)]
    if groups and not ready:
        lacks.append((f"none of {len(groups)} IOMMU groups is bound to vfio-pci", _BIND_HINT))
    findings = [Finding(subject, Level.WARNING, what, remedy) for what, remedy in lacks]
    if ready:
        findings.append(Finding(subject, Level.OK, f"ready: {', '.join(ready)}; {_opened_by(host)}"))
    return findings


def _opened_by(host: Host) -> str:
    return "IOMMUFD" if has_iommufd(host) else "no IOMMUFD"


def _listed(host: Host, folder: str) -> list[str]:
    try:
        return os.listdir(host.root / folder)
    except OSError:
        return []


def protection(qemu: Qemu, root: Path) -> list[Finding]:
    """What hides a confidential guest from this host, and what else it cannot be without."""
    from hypervisor import confidential
    from shim.confidential import protection as protection_of

    host, guest_arch = Host(root=root), arch(qemu)
    needs: dict[str, Callable[[], str]] = {
        "acceleration": lambda: confidential.choose_accel(guest_arch, host).value,
        "vsock": lambda: confidential.choose_vsock(host).value,
        "protection": lambda: protection_of(qemu, guest_arch, host).id,
    }
    findings = []
    for subject, need in needs.items():
        try:
            findings.append(Finding(subject, Level.OK, need()))
        except HostUnsupported as error:
            findings.append(Finding(subject, Level.MISSING, *_split(error)))
    return findings


def sharing(qemu: Qemu) -> list[Finding]:
    """How the containers' files get into the guest."""
    if qemu.shared_fs == "none":
        return [Finding("virtiofsd", Level.NOTE, 'not used: shared_fs = "none"')]
    found = next((path for path in virtiofsd_places(qemu) if os.access(path, os.X_OK)), None)
    if found is None:
        remedy = "apt-get install virtiofsd (Debian 12: it comes with QEMU)"
        return [Finding("virtiofsd", Level.MISSING, "not at " + " or ".join(virtiofsd_places(qemu)), remedy)]
    return [Finding("virtiofsd", Level.OK, found)]


def virtiofsd_places(qemu: Qemu) -> tuple[str, ...]:
    """The configured place, or the usual ones when the key is empty or the configuration unusable."""
    return (
        (qemu.virtio_fs_daemon,)
        if qemu.virtio_fs_daemon
        else ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
    )


def _without(others: Iterable[Finding], findings: Iterable[Finding]) -> list[Finding]:
    """Those of the findings that others do not have already, under their own subject."""
    told = {finding.detail for finding in others}
    return [finding for finding in findings if finding.detail not in told]


def _split(error: HypervisorError) -> tuple[str, str]:
    problem, _, remedy = str(error).partition("; ")
    return problem, remedy


def guest(qemu: Qemu) -> list[Finding]:
    """The kernel and what it boots into. A guest of another maker has no manifest, which is fine."""
    files = [Path(name) for name in (qemu.kernel, qemu.initrd, qemu.image, qemu.image_initrd) if name]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        return [Finding("guest", Level.MISSING, f"not there: {', '.join(missing)}", "kata-py guest build")]
    try:
        manifest = Manifest.read(files[0].with_name(MANIFEST))
    except ImageError:
        return [Finding("guest", Level.OK, ", ".join(map(str, files)))]
    return [Finding("guest", Level.OK, f"{summary(manifest)}, at {files[0].parent}")]


def other_guests(qemu: Qemu) -> list[Finding]:
    """Guests of other architectures than the configured machine's, where there are any."""
    findings = []
    for machine, arch_name in ARCHITECTURES.items():
        folder = Path(qemu.guest_dir) / arch_name
        if machine == qemu.machine_type or not (folder / MANIFEST).exists():
            continue
        emulator = DEFAULT_QEMUS[machine]
        if os.access(emulator, os.X_OK):
            findings.append(Finding("guest", Level.OK, f"{arch_name} at {folder}, with {emulator}"))
        else:
            detail = f"{arch_name} at {folder}, but there is no {emulator}"
            remedy = f"{INSTALL} {QEMU_PACKAGES[machine]}"
            findings.append(Finding("guest", Level.WARNING, detail, remedy))
    return findings


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

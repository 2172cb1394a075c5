"""Which accelerator and which vsock transport a machine gets on this host.

`auto` never fails: it takes the second best with a reason for the caller to log once (a WARN for the
accelerator, an INFO for vsock). An explicit setting that cannot work is an error with a remedy.

KVM has to be able to run a guest, not only to open: hosts exist whose /dev/kvm accepts a machine and then
spins for ever in it, because the processor offers neither vmx nor svm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from hypervisor.errors import HostUnsupported
from hypervisor.host import Host

if TYPE_CHECKING:
    from hypervisor.spec import Accel, VsockKind

AccelSetting = Literal["auto", "kvm", "tcg"]
VsockSetting = Literal["auto", "vhost", "user"]

_KVM = "dev/kvm"
VHOST_VSOCK = "dev/vhost-vsock"
_X86 = frozenset({"x86_64", "i686"})

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A decision; `reason` says why `auto` did not take the better one, else it is None."""

    value: T
    reason: str | None = None


def choose_accel(
    setting: AccelSetting, *, guest_arch: str | None = None, host: Host | None = None
) -> Choice[Accel]:
    """Decide between KVM and TCG for a guest of `guest_arch` (default: the host's architecture).

    Raises HostUnsupported when the setting is "kvm" and KVM cannot run such a guest here.
    """
    host = host or Host()
    if setting == "tcg":
        return Choice("tcg")
    problem = why_not_kvm(host, guest_arch or host.arch)
    if problem is None:
        return Choice("kvm")
    if setting == "kvm":
        raise HostUnsupported(
            f'accel = "kvm" cannot work: {problem}; enable virtualization for this host or set accel = "auto"'
        )
    return Choice("tcg", f"KVM is not used: {problem}; the guest is emulated (TCG) and several times slower")


def choose_vsock(setting: VsockSetting, *, host: Host | None = None) -> Choice[VsockKind]:
    """Decide between the kernel's vhost-vsock and our own device.

    Raises HostUnsupported when the setting is "vhost" and /dev/vhost-vsock does not open.
    """
    if setting == "user":
        return Choice("user")
    problem = (host or Host()).why_not_openable(VHOST_VSOCK)
    if problem is None:
        return Choice("vhost")
    if setting == "vhost":
        raise HostUnsupported(
            f'vsock = "vhost" cannot work: /dev/vhost-vsock: {problem}; '
            'load the kernel module vhost_vsock or set vsock = "auto"'
        )
    return Choice("user", f"/dev/vhost-vsock: {problem}; the vsock device runs in this process")


def why_not_kvm(host: Host, guest_arch: str) -> str | None:
    """None when KVM can run such a guest, else the reason."""
    if guest_arch != host.arch:
        return f"the guest is {guest_arch}, the host {host.arch}"
    if problem := host.why_not_openable(_KVM):
        return f"/dev/kvm: {problem}"
    if host.arch in _X86 and not host.cpu_flags() & {"vmx", "svm"}:
        return "/dev/kvm opens, but the processor has neither vmx nor svm"
    return None

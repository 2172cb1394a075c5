"""Containers of other architectures than the host's: how they are recognised, and what of their specs is the host's.

For which architecture a program is, say the first bytes of one file of the image. The image vouches for nothing, so
this is a guess with bounds: a file that cannot be found, read or understood says nothing, and the guest's kernel has
the last word. A script is for what its interpreter is for; where the program is nowhere, because a volume brings it,
the image's shell stands in for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.arch import MACHINES
from hypervisor.host import Host
from shim import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent_proto.gen.oci_pb2 import LinuxSeccomp, Process

# As much as the kernel reads of a program to know what it is (linux/binfmts.h).
_HEAD_BYTES = 256
# By the machine in an ELF header, its class (2: 64 bits) and byte order (2: big), see elf.h: the type of machine whose
# guests run it. Those with x86_64 and arm64 run their 32-bit predecessors' programs; x86_64 also has 32-bit pointers.
_RUNS_ON = {
    (3, 1, 1): "q35",
    (62, 2, 1): "q35",
    (62, 1, 1): "q35",
    (183, 2, 1): "virt",
    (40, 1, 1): "virt",
    (22, 2, 2): "s390-ccw-virtio",
}
# Where programs without a path are looked for when the environment does not say.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELL = "/bin/sh"


def machine_type_for(root: str, process: Process) -> str | None:
    """The type of machine whose guests run the process's program; `root` is the container's root file system."""
    for path in (*_places(process), _SHELL):
        head = _head(root, path)
        if head.startswith(b"#!") and (words := head[2:].split(maxsplit=1)):
            head = _head(root, words[0].decode(errors="replace"))
        if found := of_header(head):
            return found
    return None


def of_header(head: bytes) -> str | None:
    """The type of machine for a program with these first bytes; None for what is no program that we know."""
    if len(head) < 20 or not head.startswith(b"\x7fELF"):
        return None
    machine = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
    return _RUNS_ON.get((machine, head[4], head[5]))


def _places(process: Process) -> Iterator[str]:
    if not process.Args:
        return
    program = process.Args[0]
    if "/" in program:
        yield program if program.startswith("/") else f"{process.Cwd}/{program}"
        return
    path = next((word[5:] for word in process.Env if word.startswith("PATH=")), _PATH)
    for folder in path.split(":"):
        yield f"{folder or process.Cwd}/{program}"


def _head(root: str, path: str) -> bytes:
    try:
        return mounts.head_in_root(root, path, _HEAD_BYTES)
    except (OSError, ValueError):  # a name may hold what no path does
        return b""


def fit_seccomp(seccomp: LinuxSeccomp, machine_type: str) -> None:
    """Make a filter that was written for the host one for the guest, where these differ."""
    guest, host = MACHINES[machine_type], Host().arch
    if guest == host:
        return
    # The guest's own architecture is always filtered; one of another byte order cannot be beside it.
    seccomp.ClearField("Architectures")
    if "s390x" in (guest, host):
        # There, clone(2) has stack and flags, which is what filters look at, the other way round.
        for rule in seccomp.Syscalls:
            for arg in rule.Args if list(rule.Names) == ["clone"] else ():
                arg.Index = {0: 1, 1: 0}.get(arg.Index, arg.Index)

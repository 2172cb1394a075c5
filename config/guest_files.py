"""What few configurations ask for: host paths that every guest sees, and directories that containers share."""

import os
import re

from config.describe import show
from config.schema import Qemu, Runtime
from config.tree import KeyPath, Report

_MODES = ("ro", "rw")
# Kata's own rule: the paths become part of mounts inside the guest.
_GUEST_PATH = re.compile(r"(/[-\w.]+)+/?", re.ASCII)


def bind_mounts(runtime: Runtime, qemu: Qemu, report: Report) -> tuple[str, ...]:
    """`sandbox_bind_mounts`, each as `PATH:MODE` with a path that exists and has no symbolic links."""
    where: KeyPath = ("runtime", "sandbox_bind_mounts")
    if qemu.shared_fs == "none":
        hint = 'remove it, or set shared_fs to "virtio-fs"'
        shared_fs: KeyPath = ("hypervisor", runtime.hypervisor_name, "shared_fs")
        report.add(where, 'nothing is shared with shared_fs = "none"', hint, also=(shared_fs,))
        return runtime.sandbox_bind_mounts
    names: set[str] = set()
    checked = []
    for index, entry in enumerate(runtime.sandbox_bind_mounts):
        path, _, mode = entry.rpartition(":")
        if mode not in _MODES:
            path, mode = entry, "ro"
        real = os.path.realpath(path) if "\0" not in path else path
        name = os.path.basename(real)
        problem = ""
        if not (path.startswith("/") and path.isprintable() and os.path.exists(real)):
            problem = f"{show(path)} is no absolute path of something that exists"
        elif not name or name in names:
            problem = f"want a name that no other entry has, got {show(name)}"
        if problem:
            report.add((*where, index), problem)
        names.add(name)
        checked.append(f"{real}:{mode}")
    return tuple(checked)


def check_shared_mounts(runtime: Runtime, report: Report) -> None:
    """Each names two containers and a path in each, out of which it does not lead."""
    for index, mount in enumerate(runtime.shared_mounts):
        where: KeyPath = ("runtime", "shared_mounts", index)
        for name in ("src_ctr", "dst_ctr"):
            if not getattr(mount, name):
                report.add((*where, name), "want a container's name, got ''")
        for name in ("src_path", "dst_path"):
            path = getattr(mount, name)
            if not _GUEST_PATH.fullmatch(path) or ".." in path.split("/"):
                report.add((*where, name), f"want an absolute path of plain characters, got {show(path)}")

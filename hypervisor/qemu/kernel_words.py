"""The guest kernel's command line: one pure function, and the rules by which words replace each other.

Order: the architecture's words, words for speed by accelerator, how much the kernel talks, Kata's words, the
root file system of an image, the IOMMU, what the agent is told, and last the configured `kernel_params`.

Replacement: a configured word takes the place of ours with the same key (the part before `=`), so
`panic=10` is enough to change `panic=-1`; no word of ours has to be removed by hand. Keys that the kernel or
systemd read many times (`console`, `systemd.mask`, ...) add up instead. Double quotes protect spaces.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.room import room_mib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.arch import Arch
    from hypervisor.spec import RootfsType, VmSpec

# A stock Kata guest that boots with systemd starts its agent by these; others ignore them.
_KATA_WORDS = (
    "systemd.unit=kata-containers.target",
    "systemd.mask=systemd-networkd.service",
    "systemd.mask=systemd-networkd.socket",
)
# Whoever changes a control group, an interface or a module waits until all processors have let go of the old one: for
# the clock's next ticks, unless they are asked at once. A guest has few processors to ask.
_SPEED_WORDS = ("rcupdate.rcu_expedited=1",)
# What keeps a real processor from speculating is translated to something that does not.
_TCG_WORDS = ("mitigations=off",)
# The disk is attached read-only, so nothing may be replayed or remounted on errors for writing.
_ROOTFLAGS: dict[RootfsType, tuple[str, ...]] = {
    "ext4": ("data=ordered", "errors=remount-ro"),
    "xfs": (),
    "erofs": (),
}
_ADDING_KEYS = frozenset(
    {"console", "earlycon", "systemd.mask", "systemd.wants", "systemd.setenv", "modprobe.blacklist", "dyndbg"}
)
# What says how the guest boots is inside the kernel's file when that is sealed.
_BOOT_KEYS = frozenset({"reboot", "systemd.unit", "systemd.mask", "root", "rootflags", "rootfstype"})
_WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')


def kernel_command_line(spec: VmSpec, arch: Arch) -> str:
    """Everything the kernel is told, as one line."""
    words = [
        *arch.kernel_words,
        *_SPEED_WORDS,
        *_tcg_words(spec, arch),
        "panic=-1",  # at once: -no-reboot makes it QEMU's exit, and the exit is how we learn of it
        *(() if spec.debug else ("quiet",)),
        *_KATA_WORDS,
        *_root_words(spec, arch),
        *(
            f"kata.extension.{e.name}.verity_params={e.verity_params}"
            for e in spec.extensions
            if e.verity_params
        ),
        *(arch.iommu.kernel_words if spec.iommu and arch.iommu is not None else ()),
        *_growth_words(spec, arch),
        *((f"maxcpus={spec.vcpus}",) if spec.parks_vcpus else ()),
        *_agent_words(spec),
    ]
    words = merged(words, split(spec.kernel_params))
    if spec.protection is not None and spec.protection.boots_from_kernel:
        words = [word for word in words if _key(word) not in _BOOT_KEYS]
    return " ".join(words)


def merged(words: Iterable[str], configured: Iterable[str]) -> list[str]:
    """`words` followed by `configured`; a configured word drops every earlier word that it replaces."""
    result = list(words)
    for word in configured:
        key = _key(word)
        if key not in _ADDING_KEYS:
            result = [old for old in result if _key(old) != key]
        elif word in result:
            continue
        result.append(word)
    return result


def split(params: str) -> list[str]:
    """Words separated by white space, which double quotes protect; quotes are kept, the kernel wants them."""
    return _WORD.findall(params)


def _key(word: str) -> str:
    # The kernel takes - and _ for the same in names of parameters.
    return word.partition("=")[0].replace("-", "_")


def _tcg_words(spec: VmSpec, arch: Arch) -> tuple[str, ...]:
    if spec.accel != "tcg":
        return ()
    words = (*_TCG_WORDS, *arch.tcg_kernel_words)
    if max(spec.vcpus, spec.max_vcpus) == 1:
        words = (*words, *arch.tcg_one_cpu_words)
    if arch.tsc and spec.tsc_khz is not None:
        return (*words, f"tsc_early_khz={spec.tsc_khz}", "tsc=reliable")
    return words


def _root_words(spec: VmSpec, arch: Arch) -> tuple[str, ...]:
    if spec.image is None:
        if spec.verity is not None:
            raise InvalidSpec("kernel_verity_params are of an image, and the guest has none; set image")
        return ()
    disk = "/dev/pmem0p" if spec.rootfs_driver == "nvdimm" else "/dev/vda"
    flags, root, before = _ROOTFLAGS[spec.rootfs_type], f"{disk}1", tuple[str, ...]()
    if spec.verity is not None:
        # Checked blocks are copies, so there is nothing that could be mapped directly.
        before, root = (spec.verity.kernel_word(f"{disk}1", f"{disk}2"),), "/dev/dm-0"
    elif spec.rootfs_driver == "nvdimm" and arch.dax:
        flags = ("dax", *flags)
    read_only = (f"rootflags={','.join(flags)}", "ro") if flags else ("rootflags=ro",)
    return (*before, f"root={root}", *read_only, f"rootfstype={spec.rootfs_type}")


def _growth_words(spec: VmSpec, arch: Arch) -> tuple[str, ...]:
    """Added memory is used at once. With virtio-mem it has to come back, so most of it is for what can be moved."""
    if not room_mib(spec, arch):
        return ()
    movable = ("memory_hotplug.online_policy=auto-movable",) if spec.virtio_mem else ()
    return (*arch.growth_words, "memhp_default_state=online", *movable)


def _agent_words(spec: VmSpec) -> list[str]:
    words = []
    if spec.log_vport is not None:
        words.append(f"agent.log_vport={spec.log_vport}")
    if spec.ready_vport is not None:
        words.append(f"kata_py.ready_vport={spec.ready_vport}")
    return words

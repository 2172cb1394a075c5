"""The small initrd beside a root image, for kernels that have drivers and dm-verity as modules, as Debian's do.

It loads the modules, follows the same words of the command line that a kernel with everything built in would follow
itself, and gives way to the image's /init: a shell script, because a second Python start would cost more than the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_image.contents import Contents
from guest_image.cpio import Tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guest_image.file_systems import FileSystem
    from guest_image.kernel import ModuleDirectory
    from guest_image.tools import Root

_APPLETS = ("cat", "insmod", "mount", "reboot", "sh", "switch_root", "umount")
_DISK = ("virtio_pci", "virtio_blk")
#: Found through ACPI, which of our kernels only those for PCs have.
_PERSISTENT_MEMORY = {"amd64": ("nfit", "nd_pmem")}
_VERITY = ("dm_mod", "dm_verity")

# QEMU runs with -no-reboot, so a reboot is its end; the host then quotes what was said last.
_SCRIPT = """\
#!/bin/sh
set -f
fail() {
    echo "guest image: $1"
    reboot -f
}
load() {
    for module; do
        insmod "/modules/$module.ko" || fail "cannot load the kernel module $module"
    done
}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
read -r line </proc/cmdline
for word in $line; do
    case "$word" in
    root=*) root=${word#*=} ;;
    rootflags=*) flags=${word#*=} ;;
    rootfstype=*) kind=${word#*=} ;;
    esac
done
case "$line" in
*dm-mod.create=\\"*)
    table=${line#*dm-mod.create=\\"}
    table=${table%%\\"*}
    ;;
esac
case "$root$table" in
*/dev/pmem*)
    [ "@PMEM@" ] || fail "it has no driver for persistent memory on this architecture; use a virtio disk"
    load @PMEM@
    # Regions are found at leisure; this reads to its end when they all are.
    cat /sys/bus/nd/devices/ndbus0/wait_probe >/dev/null
    ;;
*) load @DISK@ ;;
esac
load @FILE_SYSTEM@
if [ "$table" ]; then
    [ "@VERITY@" ] || fail "it was built without dm-verity; remove kernel_verity_params or build it with --verity"
    load @VERITY@
    dmsetup --noudevsync --noudevrules create --concise "$table" || fail "cannot set up dm-verity: $table"
fi
mount -r -t "$kind" -o "$flags" "$root" /image || fail "cannot mount $root as $kind"
umount /dev /sys /proc
exec switch_root /image /init
"""


def image_initrd(
    kind: FileSystem, *, arch: str, verity: bool, modules: ModuleDirectory, packages: Root
) -> bytes:
    """The archive for a root file system of one kind.

    `packages` has busybox, and dmsetup for `verity`. Raises ImageError.
    """
    contents = Contents(Tree(), packages)
    for name in ("dev", "proc", "sys", "image"):
        contents.tree.directory(name)
    for name in ("lib", "lib64"):
        contents.tree.directory(f"usr/{name}")
        contents.tree.symlink(name, f"usr/{name}")
    contents.tree.character_device("dev/console", 5, 1)
    contents.program("busybox", packages.find("usr/bin/busybox", "bin/busybox"), "bin/busybox")
    for applet in _APPLETS:
        contents.tree.symlink(f"bin/{applet}", "busybox")
    if verity:
        contents.program("dmsetup", packages.find("usr/sbin/dmsetup", "sbin/dmsetup"), "bin/dmsetup")
    wanted = {
        "@DISK@": _DISK,
        "@PMEM@": _PERSISTENT_MEMORY.get(arch, ()),
        "@FILE_SYSTEM@": (kind,),
        "@VERITY@": _VERITY if verity else (),
    }
    drivers = {word: modules.closure(names) for word, names in wanted.items()}
    for module in {module.name: module for found in drivers.values() for module in found}.values():
        contents.add("kernel modules", f"modules/{module.name}.ko", module.data)
    script = init_script({word: [module.name for module in found] for word, found in drivers.items()})
    contents.add("init", "init", script.encode(), 0o755)
    return contents.tree.to_cpio()


def init_script(drivers: Mapping[str, Sequence[str]]) -> str:
    """The shell script that is PID 1 until the image takes over. `drivers` are modules in the order of loading."""
    script = _SCRIPT
    for word, names in drivers.items():
        script = script.replace(word, " ".join(names))
    return script

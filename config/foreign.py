"""A pod for another type of machine than the files are about, because its annotations or its image want that.

What the files say of programs, of the guest and of the processor belongs to the architecture that they are for. For
another one the defaults apply instead; what protects guests, or what they may use, stays as it is.
"""

from collections.abc import Collection

from config.tree import KeyPath, Tree

_SECTION = ("hypervisor", "qemu")
MACHINE_TYPE: KeyPath = (*_SECTION, "machine_type")
BOUND = (
    "path", "kernel", "initrd", "image", "image_initrd", "rootfs_type", "vm_rootfs_driver",
    "disable_image_nvdimm", "kernel_verity_params", "firmware", "firmware_volume", "pflashes",
    "machine_accelerators", "cpu_features", "guest_extension_images", "enable_iommu_platform",
)  # fmt: skip
"""The keys whose values are of one architecture."""


def choose(tree: Tree, machine_type: str, origin: str) -> None:
    """Make another type of machine that of the tree."""
    drop_bound(tree)
    tree.merge(origin, {"hypervisor": {"qemu": {"machine_type": machine_type}}})


def drop_bound(tree: Tree, keep: Collection[KeyPath] = ()) -> None:
    """Take out what is of the architecture that the tree was for, but for the keys to `keep`."""
    for key in BOUND:
        if (*_SECTION, key) not in keep:
            tree.forget((*_SECTION, key))

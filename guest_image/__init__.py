"""The guest image: a kernel and an initrd with our agent, made from the distribution's packages without root.

    build(output, progress=print) -> Manifest       vmlinux, initrd.img and manifest.json in `output`
    build(..., image="erofs", verity=True)          the same, and rootfs.img with image-initrd.img

Raises ImageError, one line with what to do.
"""

from guest_image.build import build
from guest_image.errors import ImageError
from guest_image.manifest import Manifest

__all__ = ["ImageError", "Manifest", "build"]

"""`guest_extension_images`: which are used, and what their names and hashes have to look like."""

import re
from collections.abc import Callable

from msgspec.structs import replace

from config import verity
from config.describe import show
from config.schema import GuestExtensionImage
from config.tree import KeyPath, Report

# It becomes the serial number of a virtio disk, `extension-NAME`, of which the guest sees 20 characters.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,10}")


def adjusted(
    images: tuple[GuestExtensionImage, ...],
    where: KeyPath,
    report: Report,
    file_at: Callable[[KeyPath, str], str],
) -> tuple[GuestExtensionImage, ...]:
    """Those that have a file, with what `file_at` makes of its path."""
    kept, names = [], set[str]()
    for index, image in enumerate(images):
        here: KeyPath = (*where, index)
        if not image.path:
            continue
        if not _NAME.fullmatch(image.name) or image.name in names:
            problem = "want a name that no other has, of 1 to 10 letters, digits, _ and -"
            report.add((*here, "name"), f"{problem}, got {show(image.name)}")
        names.add(image.name)
        if problem := verity.problem_of(image.verity_params):
            report.add((*here, "verity_params"), problem)
        kept.append(replace(image, path=file_at((*here, "path"), image.path)))
    return tuple(kept)

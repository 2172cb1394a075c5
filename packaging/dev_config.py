"""Writes the configuration of a source checkout: the built-in defaults, with the checkout's own guests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = """\
# Written by {writer}. docs/configuration.md has every key and its default.

[hypervisor.qemu]
kernel = {kernel}
initrd = {initrd}
guest_dir = {guest_dir}
"""


def render(guest: Path, *, writer: str) -> str:
    """The text of a configuration whose kernel and initrd are those in the folder `guest`; those of other architectures
    are below `foreign` beside it."""
    # A JSON string is a TOML basic string as well.
    return TEMPLATE.format(
        writer=writer,
        kernel=json.dumps(str(guest / "vmlinux")),
        initrd=json.dumps(str(guest / "initrd.img")),
        guest_dir=json.dumps(str(guest.parent / "foreign")),
    )

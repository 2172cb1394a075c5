"""Images that bring the guest more programs than its root file system has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A read-only disk, which the guest knows by its serial number, `extension-NAME`."""

    name: str
    """At most 10 characters: a virtio disk's serial number has 20."""
    image: Path
    verity_params: str = ""
    """What the guest checks it with, as text for its kernel's command line."""

"""Sandboxes on the host that belong to one private containerd: those whose bundle lies in its folder.

Normally there are none left once their tasks are deleted. After a crash of containerd or a shim, the shim's own
`delete`, which containerd would have called, removes what is left.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from private_containerd import PrivateContainerd

STATE = Path("/run/kata-py")
DELETE_TIMEOUT_S = 30.0


def left(server: PrivateContainerd, *, state: Path = STATE) -> list[str]:
    """Ids of the sandboxes with a record that names a bundle of this containerd."""
    found = []
    for record in sorted(state.glob("*/record.json")):
        # Gone in this moment, or cut short: nothing that could be told to be ours.
        with suppress(OSError, ValueError, KeyError, TypeError):
            if Path(json.loads(record.read_text())["bundle"]).is_relative_to(server.folder):
                found.append(record.parent.name)
    return found


def clean_up(server: PrivateContainerd, shim: Path, *, state: Path = STATE) -> list[str]:
    """Has the shim remove what is left; returns the ids. Call it when containerd does not run any more."""
    found = left(server, state=state)
    for sandbox in found:
        subprocess.run(
            [shim, "-namespace", "default", "-id", sandbox, "-bundle", server.folder, "delete"],
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=DELETE_TIMEOUT_S,
            check=False,
        )
    return found

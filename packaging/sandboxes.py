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
    from collections.abc import Collection

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


def clean_up(
    server: PrivateContainerd, shim: Path, *, keep: Collection[str] = (), state: Path = STATE
) -> list[str]:
    """Has the shim remove what is left, except for the ids to `keep`; returns the ids. Their shims have ended."""
    found = [sandbox for sandbox in left(server, state=state) if sandbox not in keep]
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

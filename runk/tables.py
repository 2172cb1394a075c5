"""What `list` and `ps` print."""

from __future__ import annotations

import pwd

from oci_engine import json_text
from oci_engine.errors import EngineError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.container import Engine
    from oci_engine.state import Status

_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")


def owner_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def state_json(engine: Engine, status: Status) -> dict[str, object]:
    """A container's state as the specification has it, with a few fields more."""
    state = engine.state_of(status)
    return {
        "ociVersion": status.oci_version,
        "id": status.id,
        "pid": 0 if state == "stopped" else status.pid,
        "status": state,
        "bundle": status.bundle,
        "rootfs": status.rootfs,
        "created": status.created,
        "owner": owner_of(status.owner),
        "annotations": status.spec.get("annotations") or {},
    }


def list_text(engine: Engine, form: str, *, quiet: bool) -> str:
    states = []
    for container_id in engine.ids():
        try:
            states.append(state_json(engine, engine.load(container_id)))
        except NotFound:  # being made, or being deleted
            continue
    if quiet:
        return "".join(f"{state['id']}\n" for state in states)
    if form == "json":
        return json_text.dumps(states) + "\n"
    rows = [_COLUMNS, *(tuple(str(state[name.lower()]) for name in _COLUMNS) for state in states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(line.rstrip() + "\n" for line in lines)


def ps_text(pids: list[int], form: str, arguments: list[str]) -> str:
    """The host's `ps`, and of its lines those of the container. Raises EngineError."""
    if form == "json":
        return json_text.dumps(pids) + "\n"
    import subprocess

    try:
        done = subprocess.run(["ps", *(arguments or ["-ef"])], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EngineError("there is no program `ps` on this host; use --format json") from None
    if done.returncode != 0:
        raise EngineError(f"ps: {done.stderr.strip()}")
    header, *lines = done.stdout.splitlines()
    names = header.split()
    if "PID" not in names:
        raise EngineError(f"ps {' '.join(arguments)}: its output has no column PID")
    column = names.index("PID")
    wanted = {str(pid) for pid in pids}
    return "".join(
        f"{line}\n" for line in [header, *(each for each in lines if each.split()[column] in wanted)]
    )

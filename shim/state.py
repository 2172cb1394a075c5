"""The legal life of a process, on one screen. Init processes and execs live the same life."""

from __future__ import annotations

from enum import Enum

from shim.errors import StateConflict


class State(Enum):
    """Where a process is. Values are the numbers of `containerd.v1.types.Status`."""

    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    # Told while a pause is under way; no process is ever in it.
    PAUSING = 5


MOVES = {
    (State.CREATED, "start"): State.RUNNING,
    (State.CREATED, "exit"): State.STOPPED,
    (State.RUNNING, "pause"): State.PAUSED,
    (State.PAUSED, "resume"): State.RUNNING,
    (State.RUNNING, "exit"): State.STOPPED,
    (State.PAUSED, "exit"): State.STOPPED,
    # Deleting keeps the state: the process leaves the table. A created one may be given up without a start.
    (State.STOPPED, "delete"): State.STOPPED,
    (State.CREATED, "delete"): State.CREATED,
}


def after(state: State, verb: str, what: str) -> State:
    """The state after `verb`.

    Raises:
        StateConflict: `what`, for example "container web", cannot do that now.
    """
    try:
        return MOVES[state, verb]
    except KeyError:
        raise StateConflict(f"cannot {verb} {what}: it is {state.name.lower()}") from None

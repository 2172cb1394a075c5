"""Each verb in each state, with the words that callers of other runtimes know."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from oci_engine.errors import AlreadyExists, EngineError, NotFound, StateConflict
from oci_engine.options import CreateOptions
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.containers import Containers

    Verb = Callable[[Containers, str], object]

VERBS: dict[str, Verb] = {
    "create": lambda made, name: made.engine.create(
        name, str(made.folder / f"bundle-{name}"), CreateOptions()
    ),
    "start": lambda made, name: made.engine.start(name),
    "exec": lambda made, name: made.exec(name, "true"),
    "pause": lambda made, name: made.engine.pause(name),
    "resume": lambda made, name: made.engine.resume(name),
    "kill": lambda made, name: made.engine.kill(name, signal.SIGCONT),
    "kill all": lambda made, name: made.engine.kill(name, signal.SIGCONT, everyone=True),
    "update": lambda made, name: made.engine.update(name, {"pids": {"limit": 100}}),
    "stats": lambda made, name: made.engine.stats(name),
    "ps": lambda made, name: made.engine.pids(name),
    "state": lambda made, name: made.engine.load(name),
    "delete": lambda made, name: made.engine.delete(name),
    "delete by force": lambda made, name: made.engine.delete(name, force=True),
}
GONE = "does not exist"
#: What a verb is refused with, by state; "" where it is done.
REFUSED: dict[str, dict[str, str]] = {
    "none": dict.fromkeys(VERBS, GONE) | {"create": "", "delete by force": ""},
    "created": dict.fromkeys(VERBS, "") | {
        "create": "already exists", "resume": "cannot resume a container in the created state",
    },
    "running": dict.fromkeys(VERBS, "") | {
        "create": "already exists", "start": "cannot start a container in the running state",
        "resume": "cannot resume a container in the running state", "delete": "that is not stopped: running",
    },
    "paused": dict.fromkeys(VERBS, "") | {
        "create": "already exists", "start": "cannot start a container in the paused state",
        "exec": "cannot exec in a paused container", "pause": "cannot pause a container in the paused state",
        "delete": "that is not stopped: paused",
    },
    "stopped": dict.fromkeys(VERBS, "") | {
        "create": "already exists", "start": "cannot start a container in the stopped state",
        "exec": "cannot exec in a stopped container", "pause": "cannot pause a container in the stopped state",
        "resume": "cannot resume a container in the stopped state", "kill": "container not running",
        "update": "cannot update a container in the stopped state", "stats": "is not running",
    },
}  # fmt: skip
AFTER = {
    ("none", "create"): "created", ("created", "start"): "running", ("created", "pause"): "paused",
    ("running", "pause"): "paused", ("paused", "resume"): "running",
}  # fmt: skip


def bring(containers: Containers, state: str) -> tuple[str, int]:
    """A container in that state: its id, and the pid of its process or 0."""
    if state == "none":
        return containers.bundle(spec("sleep", "1000"))[0], 0
    container_id, pid, _ = containers.create(spec("sleep", "1000"))
    if state != "created":
        containers.engine.start(container_id)
    if state == "paused":
        containers.engine.pause(container_id)
    if state == "stopped":
        containers.engine.kill(container_id, signal.SIGKILL)
        wait(pid)
        pid = 0
    return container_id, pid


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", REFUSED)
def test_verb_in_state(containers: Containers, state: str, verb: str) -> None:
    container_id, pid = bring(containers, state)
    engine = containers.engine
    words = REFUSED[state][verb]
    deletes = verb.startswith("delete") and not words
    try:
        if words:
            with pytest.raises(EngineError, match=words) as caught:
                VERBS[verb](containers, container_id)
            kind = {GONE: NotFound, "already exists": AlreadyExists}.get(words, StateConflict)
            assert caught.type is kind
        else:
            done = VERBS[verb](containers, container_id)
            pid = done if verb == "create" and isinstance(done, int) else pid
        if state != "none" and not deletes:
            assert engine.state_of(engine.load(container_id)) == AFTER.get((state, verb), state)
        if deletes:
            assert engine.ids() == []
    finally:
        engine.delete(container_id, force=True)
        if pid:
            wait(pid)

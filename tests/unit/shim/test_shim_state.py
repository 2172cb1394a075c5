"""Every state with every verb."""

from __future__ import annotations

import itertools

import pytest

from shim.errors import StateConflict
from shim.state import State, after

VERBS = ("start", "exit", "pause", "resume", "delete")
LEGAL = {
    ("CREATED", "start"): "RUNNING",
    ("CREATED", "exit"): "STOPPED",
    ("CREATED", "delete"): "CREATED",
    ("RUNNING", "pause"): "PAUSED",
    ("RUNNING", "exit"): "STOPPED",
    ("PAUSED", "resume"): "RUNNING",
    ("PAUSED", "exit"): "STOPPED",
    ("STOPPED", "delete"): "STOPPED",
}


@pytest.mark.parametrize(("state", "verb"), list(itertools.product(State, VERBS)), ids=str)
def test_move(state: State, verb: str) -> None:
    expected = LEGAL.get((state.name, verb))
    if expected is not None:
        assert after(state, verb, "container web") is State[expected]
        return
    with pytest.raises(StateConflict) as caught:
        after(state, verb, "container web")
    assert str(caught.value) == f"cannot {verb} container web: it is {state.name.lower()}"


def test_numbers_are_containerd_s() -> None:
    assert {state.name: state.value for state in State} == {
        "CREATED": 1,
        "RUNNING": 2,
        "STOPPED": 3,
        "PAUSED": 4,
        "PAUSING": 5,
    }

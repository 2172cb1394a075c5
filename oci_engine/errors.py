"""What can go wrong.

EngineError
├── SpecError          the specification is wrong; names the place in it
│   └── Unsupported    it is right, and asks for what this engine does not do
├── StateConflict      the verb does not fit the container's state
├── AlreadyExists      the id is taken
├── NotFound           no such container
├── SetupFailed        the kernel refused a step; names the step
│   └── CannotExecute  the program cannot be executed; has the exit status that shells give
└── HookFailed         a hook ended badly, or not in time
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all that the engine raises on purpose."""


class SpecError(EngineError):
    """`place` is the path in the JSON document, as in `linux.namespaces[2].type`."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place


class Unsupported(SpecError):
    """A valid wish that cannot be met."""


class StateConflict(EngineError):
    """The container is in a state in which this is not allowed."""


class AlreadyExists(EngineError):
    """A container of this id exists."""


class NotFound(EngineError):
    """No container of this id exists."""


class SetupFailed(EngineError):
    """A step in making a container or process failed."""


class CannotExecute(SetupFailed):
    """`status` is 127 for a program that is not there, 126 for one that cannot be run."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class HookFailed(EngineError):
    """A hook of the specification."""

"""What the agent refuses, and why. The server turns each class into one RPC code.

AgentError             a request could not be carried out
├── InvalidRequest     the request itself is wrong
├── NotFound           the container, process, file or device named does not exist
├── AlreadyExists      the name is taken
├── StateConflict      not now: the container or process is in another state
├── NotSupported       this agent cannot do it
└── EngineFailed       the container engine said no
"""

from __future__ import annotations


class AgentError(Exception):
    """Its text is one line: what failed, on what, and why."""


class InvalidRequest(AgentError):
    """The request is wrong whenever it is sent."""


class NotFound(AgentError):
    """There is no such thing."""


class AlreadyExists(AgentError):
    """There is such a thing already."""


class StateConflict(AgentError):
    """The request fits another state of its object."""


class NotSupported(AgentError):
    """A part of the protocol that this agent does not have."""


class EngineFailed(AgentError):
    """The container engine refused, with its own sentence."""

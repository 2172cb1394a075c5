"""The shim's own refusals, without RPC words: `shim.status` says which code each becomes. Each text is one line."""

from __future__ import annotations


class ShimError(Exception):
    """Base of the shim's own refusals; the text is one line for the user."""


class NotFound(ShimError):
    """No such container, exec or sandbox."""


class AlreadyExists(ShimError):
    """The id is taken."""


class StateConflict(ShimError):
    """The move is not allowed in the state that the process is in."""


class InvalidRequest(ShimError):
    """The request, the bundle or the stdio paths make no sense."""


class GuestUnreachable(ShimError):
    """The sandbox's guest is gone or does not answer."""


class NetworkNotMirrored(ShimError):
    """An interface of the pod that the guest cannot have."""


class HookFailed(ShimError):
    """A hook of the container that has to succeed before there is one."""


class DevicesUnknown(ShimError):
    """What the pod is to have of the host's devices cannot be told."""


class NotSupported(ShimError):
    """A part of the API that this shim does not have."""

"""The one table that turns any error into an RPC status.

containerd acts on the codes: NOT_FOUND during a delete means "already gone", FAILED_PRECONDITION is a refused move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrpc import Code, RpcError, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

# By the class's name, so that answering an RPC does not have to import the packages that raise these.
RPC_CODES: Mapping[str, Code] = {
    "NotFound": Code.NOT_FOUND,
    "AlreadyExists": Code.ALREADY_EXISTS,
    "StateConflict": Code.FAILED_PRECONDITION,
    "InvalidRequest": Code.INVALID_ARGUMENT,
    "GuestUnreachable": Code.UNAVAILABLE,
    "NetworkNotMirrored": Code.FAILED_PRECONDITION,
    "HookFailed": Code.FAILED_PRECONDITION,
    "DevicesUnknown": Code.FAILED_PRECONDITION,
    "NotSupported": Code.UNIMPLEMENTED,
    "TimeoutError": Code.DEADLINE_EXCEEDED,
    "ConfigError": Code.INVALID_ARGUMENT,
    "InvalidSpec": Code.INVALID_ARGUMENT,
    "HostUnsupported": Code.FAILED_PRECONDITION,
    "HotplugRefused": Code.FAILED_PRECONDITION,
    "QmpRefused": Code.FAILED_PRECONDITION,  # the machine is there, and will say so again
    "DeviceUnavailable": Code.FAILED_PRECONDITION,
    "ProgramNotFound": Code.FAILED_PRECONDITION,
    "HypervisorError": Code.UNAVAILABLE,
    "OSError": Code.INTERNAL,
}


def status_for(err: Exception) -> Status:
    """The status that tells containerd about `err`: the most specific class of the table decides."""
    if isinstance(err, RpcError):
        return err.status
    for kind in type(err).__mro__:
        code = RPC_CODES.get(kind.__name__)
        if code is not None:
            return Status(code, one_line(err))
    return Status(
        Code.INTERNAL, f"internal error ({type(err).__name__}: {one_line(err)}); details are in the shim log"
    )


def one_line(err: BaseException) -> str:
    """The error's text without line breaks; its class's name when it has none."""
    return " | ".join(str(err).split("\n")) or type(err).__name__

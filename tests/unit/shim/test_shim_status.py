"""Which error becomes which code."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.errors import ConfigError, Problem
from hypervisor import errors as vm
from shim import errors
from shim.status import status_for
from ttrpc import Code, ConnectionClosed, RpcError

PROBLEMS = (Problem(Path("/c"), "a.b", "is wrong"), Problem(None, "", "is missing", "add it"))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.NotFound("no x"), Code.NOT_FOUND, "no x"),
        (errors.AlreadyExists("x"), Code.ALREADY_EXISTS, "x"),
        (errors.StateConflict("x"), Code.FAILED_PRECONDITION, "x"),
        (errors.InvalidRequest("x"), Code.INVALID_ARGUMENT, "x"),
        (errors.GuestUnreachable("x"), Code.UNAVAILABLE, "x"),
        (errors.NotSupported("x"), Code.UNIMPLEMENTED, "x"),
        (TimeoutError(), Code.DEADLINE_EXCEEDED, "TimeoutError"),
        (
            ConfigError(PROBLEMS),
            Code.INVALID_ARGUMENT,
            "/c: a.b: is wrong | built-in defaults: is missing (add it)",
        ),
        (vm.InvalidSpec("x"), Code.INVALID_ARGUMENT, "x"),
        (vm.HostUnsupported("x"), Code.FAILED_PRECONDITION, "x"),
        (vm.ProgramNotFound("/q", "gone", "look"), Code.FAILED_PRECONDITION, "cannot start /q: gone; look"),
        (vm.BootFailed("a", "b", "c"), Code.UNAVAILABLE, "a: b; c"),
        (vm.QmpUnavailable("x"), Code.UNAVAILABLE, "x"),
        (vm.QmpRefused("stop", "k", "d"), Code.FAILED_PRECONDITION, "QEMU refused stop: d (k)"),
        (PermissionError(1, "not allowed", "/p"), Code.INTERNAL, "[Errno 1] not allowed: '/p'"),
        (RpcError(Code.ABORTED, "from the agent"), Code.ABORTED, "from the agent"),
        (ConnectionClosed(), Code.UNAVAILABLE, "ttrpc: closed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_status(error: Exception, code: Code, text: str) -> None:
    status = status_for(error)
    assert (status.code, status.message) == (code, text)


def test_our_own_mistakes_are_named() -> None:
    status = status_for(KeyError("x\ny"))
    assert status.code is Code.INTERNAL
    assert "KeyError" in status.message
    assert "\n" not in status.message


def test_every_refusal_has_a_code() -> None:
    for kind in (*errors.ShimError.__subclasses__(), *vm.HypervisorError.__subclasses__()):
        error = kind.__new__(kind)
        Exception.__init__(error, "text")
        assert status_for(error).code is not Code.UNKNOWN
        assert "internal error" not in status_for(error).message, kind

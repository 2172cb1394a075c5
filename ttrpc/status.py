"""Status codes, and the errors that carry them.

RpcError              a call ended with a status other than OK
+-- ConnectionClosed  the connection ended before the answer came
+-- StreamClosed      a message was sent on a stream that is already finished
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.any_pb2 import Any as AnyMessage


class Code(IntEnum):
    """The status codes of gRPC, which ttRPC shares."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def _missing_(cls, value: object) -> Code:
        # A peer may be newer than this table; its failure must still arrive as a failure.
        return cls.UNKNOWN


class Status(NamedTuple):
    """The outcome of a call: a code, a sentence for people, details for programs."""

    code: Code
    message: str = ""
    details: tuple[AnyMessage, ...] = ()


class RpcError(Exception):
    """A call ended with a status other than OK. `str(error)` is the message of the status."""

    def __init__(self, code: Code, message: str, details: Iterable[AnyMessage] = ()) -> None:
        if code == Code.OK:
            raise ValueError("an RpcError needs a code other than OK")
        super().__init__(message)
        self.code = Code(code)
        self.message = message
        self.details = tuple(details)

    @property
    def status(self) -> Status:
        return Status(self.code, self.message, self.details)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code.name}, {self.message!r})"


class ConnectionClosed(RpcError):
    """The connection ended, at either end, before the call did. What the peer did with the call is unknown."""

    def __init__(self) -> None:
        super().__init__(Code.UNAVAILABLE, "ttrpc: closed")


class StreamClosed(RpcError):
    """A message was sent on a stream whose sending side is closed, by us or by the answer of the peer."""

    def __init__(self) -> None:
        super().__init__(Code.FAILED_PRECONDITION, "ttrpc: stream closed")

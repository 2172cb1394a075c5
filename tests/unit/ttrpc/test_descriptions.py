"""Statuses, errors, and the descriptions of services."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import ECHO
from ttrpc import Code, ConnectionClosed, Method, RpcError, Server, Service, Status, StreamClosed

CODES = {
    0: "OK",
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}


def test_codes_are_numbered_as_grpc_numbers_them() -> None:
    assert {int(code): code.name for code in Code} == CODES


@pytest.mark.parametrize("number", [17, -1, 1000])
def test_a_code_from_the_future_is_unknown(number: int) -> None:
    assert Code(number) is Code.UNKNOWN


def test_an_error_carries_a_status() -> None:
    detail = AnyMessage(type_url="t", value=b"v")
    error = RpcError(Code.NOT_FOUND, "no such sandbox", [detail])
    assert str(error) == "no such sandbox"
    assert error.status == Status(Code.NOT_FOUND, "no such sandbox", (detail,))
    assert repr(error) == "RpcError(NOT_FOUND, 'no such sandbox')"


def test_an_error_cannot_be_ok() -> None:
    with pytest.raises(ValueError, match="other than OK"):
        RpcError(Code.OK, "fine")


def test_the_errors_of_the_connection() -> None:
    assert (ConnectionClosed().code, str(ConnectionClosed())) == (Code.UNAVAILABLE, "ttrpc: closed")
    assert (StreamClosed().code, str(StreamClosed())) == (Code.FAILED_PRECONDITION, "ttrpc: stream closed")


def test_methods_are_found_by_name() -> None:
    assert ECHO["Both"] == Method("Both", StringValue, StringValue, True, True)
    with pytest.raises(KeyError):
        ECHO["both"]


def test_two_methods_of_one_name_are_refused() -> None:
    method = Method("Same", StringValue, StringValue)
    with pytest.raises(ValueError, match="two methods of the same name"):
        Service("t.S", (method, method))


async def unused(request: StringValue, call: object) -> StringValue:
    raise AssertionError("never called")


def test_a_handler_of_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t\.Echo has no method Other, Unar"):
        Server().register(ECHO, {"Unar": unused, "Unary": unused, "Other": unused})


def test_a_service_is_registered_once() -> None:
    server = Server()
    server.register(ECHO, {})
    with pytest.raises(ValueError, match=r"t\.Echo is registered already"):
        server.register(ECHO, {})

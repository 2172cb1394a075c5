"""Bodies of request and response frames: the envelope messages, statuses and metadata to and from bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from ttrpc.proto.request_pb2 import KeyValue, Request, Response
from ttrpc.proto.status_pb2 import Status as StatusMessage
from ttrpc.status import Code, RpcError, Status
from ttrpc.wire import MAX_DATA, too_large

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MessageT = TypeVar("MessageT", bound=Message)

# timeout_nano is a signed 64 bit number; a longer timeout than 292 years may be cut to that.
_MAX_TIMEOUT_NANO = 2**63 - 1


def encode_request(
    service: str,
    method: str,
    payload: bytes,
    remaining_s: float | None,
    metadata: Mapping[str, str | Sequence[str]] | None,
) -> bytes:
    """The body of a request frame. `remaining_s` above 0, or None for no limit.

    Raises:
        RpcError: RESOURCE_EXHAUSTED, the body is over the size limit of a frame.
    """
    request = Request(service=service, method=method, payload=payload)
    if remaining_s is not None:
        # Rounded up to 1: zero on the wire means "no limit".
        request.timeout_nano = int(min(max(remaining_s * 1e9, 1), _MAX_TIMEOUT_NANO))

    if metadata:
        for key, values in metadata.items():
            for value in (values,) if isinstance(values, str) else values:
                request.metadata.append(KeyValue(key=key.lower(), value=value))
    return _limited(request.SerializeToString())


def decode_request(body: bytearray) -> Request:
    """Raises RpcError INVALID_ARGUMENT when the body is no request."""
    return parse(Request, body, Code.INVALID_ARGUMENT)


def decode_metadata(request: Request) -> dict[str, tuple[str, ...]]:
    metadata: dict[str, tuple[str, ...]] = {}
    for pair in request.metadata:
        key = pair.key.lower()
        metadata[key] = (*metadata.get(key, ()), pair.value)
    return metadata


def encode_response(message: Message) -> bytes:
    """The body of a successful response. The status is left out, which means OK.

    Raises:
        RpcError: RESOURCE_EXHAUSTED, the body is over the size limit of a frame.
    """
    return _limited(Response(payload=message.SerializeToString()).SerializeToString())


def encode_status(status: Status) -> bytes:
    """The body of a response that is an error. One that does not fit in a frame is replaced by one that does."""
    message = StatusMessage(code=int(status.code), message=status.message, details=status.details)
    body = Response(status=message).SerializeToString()
    if len(body) > MAX_DATA:
        return encode_status(too_large(len(body)).status)
    return body


def decode_response(body: bytearray) -> bytes:
    """The payload of a successful response.

    Raises:
        RpcError: the status of the response, when it is an error; INTERNAL when the body is no response.
    """
    response = parse(Response, body, Code.INTERNAL)
    if response.HasField("status") and response.status.code:
        status = response.status
        raise RpcError(Code(status.code), status.message, status.details)
    return response.payload


def parse(kind: type[MessageT], data: bytes | bytearray, code: Code) -> MessageT:
    """Raises RpcError with `code` when `data` is not a serialized message of this kind."""
    message = kind()
    try:
        # The type stubs know only bytes; the parser itself takes any of the two without another copy.
        message.ParseFromString(data)  # type: ignore[arg-type]
    except DecodeError as error:
        raise RpcError(code, f"malformed {kind.DESCRIPTOR.full_name}: {error}") from error
    return message


def _limited(body: bytes) -> bytes:
    if len(body) > MAX_DATA:
        raise too_large(len(body))
    return body

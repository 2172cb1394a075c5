"""protobuf's own messages, filled as containerd does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp

if TYPE_CHECKING:
    from google.protobuf.message import Message


def packed(message: Message) -> Any:
    """The message in an Any. containerd writes and expects its bare name, without "type.googleapis.com/"."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since the epoch."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)

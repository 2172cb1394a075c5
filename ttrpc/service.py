"""Descriptions of services, and what a handler is given and gives back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import Message

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Method(NamedTuple, Generic[RequestT, ResponseT]):
    """One method: its bare name, its message types, and in which directions it streams."""

    name: str
    request: type[RequestT]
    response: type[ResponseT]
    client_streaming: bool = False
    server_streaming: bool = False


class Service:
    """A service: its full name as it is on the wire, and its methods by name."""

    __slots__ = ("methods", "name")

    def __init__(self, name: str, methods: tuple[Method[Any, Any], ...]) -> None:
        """Raises ValueError when two methods have the same name."""
        self.name = name
        self.methods: Mapping[str, Method[Any, Any]] = {method.name: method for method in methods}
        if len(self.methods) != len(methods):
            raise ValueError(f"service {name} has two methods of the same name")

    def __getitem__(self, name: str) -> Method[Any, Any]:
        """Raises KeyError when the service has no such method."""
        return self.methods[name]

    def __repr__(self) -> str:
        return f"Service({self.name!r}, {len(self.methods)} methods)"


class Call:
    """What a handler may know of its call besides the request.

    Attributes:
        service: full name of the service.
        method: bare name of the method.
        metadata: values by lower case key, in the order they were sent.
        deadline: in the time of the event loop (`loop.time()`), or None. It is enforced by the server.
    """

    __slots__ = ("deadline", "metadata", "method", "service")

    def __init__(
        self,
        service: str,
        method: str,
        metadata: Mapping[str, tuple[str, ...]] | None = None,
        deadline: float | None = None,
    ) -> None:
        self.service = service
        self.method = method
        self.metadata = {} if metadata is None else metadata
        self.deadline = deadline

    def __repr__(self) -> str:
        return f"Call({self.service}/{self.method})"


# The messages a handler takes and returns differ from method to method and a mapping of handlers has one type,
# hence the Any. The four shapes, by the kind of method:
#   unary             async def h(request, call) -> response
#   client streaming  async def h(requests: AsyncIterator, call) -> response
#   server streaming  async def h(request, call): yield response            (an async generator)
#   both              async def h(requests: AsyncIterator, call): yield response
Handler = Callable[[Any, Call], Awaitable[Message] | AsyncIterator[Message]]

# The rest of the way to the handler, for an interceptor. Its result is what the handler's kind produces: one
# message, or an async iterator of them.
Next = Callable[[Any, Call], Awaitable[Any]]
Interceptor = Callable[[Call, Any, Next], Awaitable[Any]]

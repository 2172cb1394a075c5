"""What a server answers: services, their handlers, and the errors a handler may raise turned into statuses."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from ttrpc.deadline import deadline_exceeded
from ttrpc.status import Code, RpcError, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ttrpc.service import Call, Handler, Interceptor, Method, Service

log = logging.getLogger("ttrpc")


class Endpoint(NamedTuple):
    """A method that this server answers."""

    method: Method[Any, Any]
    handler: Handler


class Registry:
    """Services and handlers of one server, shared by its connections."""

    __slots__ = ("_error_status", "_interceptor", "_services")

    def __init__(
        self, error_status: Callable[[Exception], Status] | None, interceptor: Interceptor | None
    ) -> None:
        self._error_status = error_status
        self._interceptor = interceptor
        self._services: dict[str, dict[str, Endpoint]] = {}

    def register(self, service: Service, handlers: Mapping[str, Handler]) -> None:
        """Raises ValueError for a service that is registered already or a handler of an unknown method."""
        if service.name in self._services:
            raise ValueError(f"service {service.name} is registered already")
        unknown = sorted(set(handlers) - set(service.methods))
        if unknown:
            raise ValueError(f"service {service.name} has no method {', '.join(unknown)}")
        self._services[service.name] = {
            name: Endpoint(service[name], handler) for name, handler in handlers.items()
        }

    def find(self, service: str, method: str) -> Endpoint:
        """Raises RpcError UNIMPLEMENTED, naming what is unknown: the service, or the method."""
        endpoints = self._services.get(service)
        if endpoints is None:
            raise RpcError(Code.UNIMPLEMENTED, f"service {service}")
        endpoint = endpoints.get(method)
        if endpoint is None:
            raise RpcError(Code.UNIMPLEMENTED, f"method {method}")
        return endpoint

    async def invoke(self, endpoint: Endpoint, request: Any, call: Call) -> Any:
        """Run the handler: one message, or an async iterator of them when the method streams to the client."""

        async def handle(request: Any, call: Call) -> Any:
            result = endpoint.handler(request, call)
            if endpoint.method.server_streaming:
                return result
            return await result  # type: ignore[misc]  # a handler of this kind returns an awaitable

        if self._interceptor is None:
            return await handle(request, call)
        return await self._interceptor(call, request, handle)

    def status_of(self, error: Exception, call: Call) -> Status:
        """The status that answers a call whose handler raised `error`. Unexpected errors are logged, once, here."""
        if isinstance(error, RpcError):
            return error.status
        if isinstance(error, TimeoutError):
            return deadline_exceeded().status
        if self._error_status is not None:
            try:
                status = self._error_status(error)
            except Exception as hook_error:
                hook_error.__context__ = error
                error = hook_error
            else:
                if status.code != Code.OK:
                    return status
        log.error("handler of %s/%s failed", call.service, call.method, exc_info=error)
        return Status(Code.INTERNAL, f"internal error ({type(error).__name__})")

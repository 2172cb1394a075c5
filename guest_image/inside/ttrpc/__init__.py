# mypy: ignore-errors
"""The server's half; the guest calls nobody."""

from ttrpc.server import Server
from ttrpc.service import Call, Handler, Interceptor, Method, Next, Service
from ttrpc.status import Code, ConnectionClosed, RpcError, Status, StreamClosed

__all__ = [
    "Call",
    "Code",
    "ConnectionClosed",
    "Handler",
    "Interceptor",
    "Method",
    "Next",
    "RpcError",
    "Server",
    "Service",
    "Status",
    "StreamClosed",
]

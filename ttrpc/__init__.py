"""ttRPC for asyncio: client and server, unary calls and streams, over any connected stream socket.

Usable by itself; README.md beside this file has examples, semantics and limits.
"""

from ttrpc.client import Client
from ttrpc.client_stream import ClientStream
from ttrpc.server import Server
from ttrpc.service import Call, Handler, Interceptor, Method, Next, Service
from ttrpc.status import Code, ConnectionClosed, RpcError, Status, StreamClosed

__all__ = [
    "Call",
    "Client",
    "ClientStream",
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

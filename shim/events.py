"""Telling containerd what happened: in order, each event once, none lost while containerd is away.

Events go to containerd's ttRPC socket. They queue up while nobody answers there and are sent in order when
containerd is back; publishing never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import structlog
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp

from shim.api.gen import types_pb2
from shim.api.gen.ttrpc_events_pb2 import ForwardRequest
from shim.api.services import EVENTS
from ttrpc import Client, Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from google.protobuf.message import Message

log = structlog.get_logger()

_CALL_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
# About one event per exec start and exit: hours of a busy pod. The oldest go first when even that is too little.
_QUEUE_LIMIT = 8192
_RETRIED = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)

TOPICS = {
    "TaskCreate": "/tasks/create",
    "TaskStart": "/tasks/start",
    "TaskExit": "/tasks/exit",
    "TaskDelete": "/tasks/delete",
    "TaskOOM": "/tasks/oom",
    "TaskExecAdded": "/tasks/exec-added",
    "TaskExecStarted": "/tasks/exec-started",
    "TaskPaused": "/tasks/paused",
    "TaskResumed": "/tasks/resumed",
}


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since the epoch as protobuf has them."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)


class Publisher:
    """An ordered queue of events and the task that empties it. Without an address events are only logged (CRI-O)."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._queue: deque[ForwardRequest] = deque(maxlen=_QUEUE_LIMIT)
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._client: Client | None = None
        self._task = asyncio.create_task(self._run(), name="events") if address else None

    def publish(self, event: Message) -> None:
        """Queue one event; its topic follows from its type."""
        kind = event.DESCRIPTOR.name
        log.debug("event_published", event_type=kind)
        if self._task is None:
            return
        envelope = types_pb2.Envelope(
            timestamp=timestamp(time.time_ns()),
            namespace=self._namespace,
            topic=TOPICS[kind],
            # containerd writes and expects the bare message name, without "type.googleapis.com/".
            event=Any(type_url=event.DESCRIPTOR.full_name, value=event.SerializeToString()),
        )
        if len(self._queue) == _QUEUE_LIMIT:
            log.warning("event_dropped", topic=self._queue[0].envelope.topic)
        self._queue.append(ForwardRequest(envelope=envelope))
        self._empty.clear()
        self._filled.set()

    async def aclose(self, grace_s: float) -> None:
        """Wait until all events are out, at most `grace_s`, and stop."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("events_lost", count=len(self._queue) + 1)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._disconnect()

    async def _run(self) -> None:
        while True:
            await self._filled.wait()
            # Taken out before it is sent: what overflows the queue meanwhile can then only be a later one.
            await self._deliver(self._queue.popleft())
            if not self._queue:
                self._filled.clear()
                self._empty.set()

    async def _deliver(self, request: ForwardRequest) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._send(request)
            except (OSError, ConnectionClosed, TimeoutError) as err:
                await self._disconnect()
                log.debug("event_delayed", topic=request.envelope.topic, error=str(err), retry_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            except RpcError as err:
                if err.code in _RETRIED:
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                    continue
                # containerd has read this one and does not want it; asking again would hold up all others.
                log.warning("event_refused", topic=request.envelope.topic, error=str(err))
                return None

    async def _send(self, request: ForwardRequest) -> None:
        if self._client is None:
            self._client = await Client.connect_unix(self._address)
        await self._client.call(EVENTS.name, EVENTS["Forward"], request, timeout_s=_CALL_TIMEOUT_S)

    async def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

"""Telling containerd what happened: in order, each event once, none lost while containerd is away.

Events go to containerd's ttRPC socket. They queue up while nobody answers there and are sent in order when
containerd is back; publishing never waits. An event is sent again only when nobody can know whether it arrived, because
its connection broke. A containerd that stands still has it in its socket: it is waited for, however long that takes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import structlog

from shim.api.gen import types_pb2
from shim.api.gen.ttrpc_events_pb2 import ForwardRequest
from shim.api.services import EVENTS
from shim.well_known import packed, timestamp
from ttrpc import Client, Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from google.protobuf.message import Message

log = structlog.get_logger()

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
# About one event per exec start and exit: hours of a busy pod. When even that is too little, what is of least use goes
# first: out-of-memory events, of which a container can cause any number, and then the oldest.
_QUEUE_LIMIT = 8192
# Answers that say "not now", whatever the event: it is sent until it is taken.
_NOT_NOW = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.ABORTED, Code.RESOURCE_EXHAUSTED)
# Answers that say "never": this event would be refused again.
_NEVER = (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.PERMISSION_DENIED)
# How often any other error is answered to one event before it is given up, so that it does not hold up all others.
_ATTEMPTS = 5

_OOM = "TaskOOM"
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


class Publisher:
    """An ordered queue of events and the task that empties it. Without an address events are only logged (CRI-O)."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._queue: deque[ForwardRequest] = deque()
        # The queued out-of-memory events, by container: another one would say nothing new.
        self._oom: dict[str, ForwardRequest] = {}
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._now = asyncio.Event()
        self._client: Client | None = None
        self._task = asyncio.create_task(self._run(), name="events") if address else None

    def publish(self, event: Message) -> None:
        """Queue one event; its topic follows from its type."""
        kind = event.DESCRIPTOR.name
        log.debug("event_published", event_type=kind)
        if self._task is None:
            return
        container_id = getattr(event, "container_id", "")
        if kind == _OOM and container_id in self._oom:
            return
        envelope = types_pb2.Envelope(
            timestamp=timestamp(time.time_ns()),
            namespace=self._namespace,
            topic=TOPICS[kind],
            event=packed(event),
        )
        if len(self._queue) >= _QUEUE_LIMIT:
            self._drop_one()
        request = ForwardRequest(envelope=envelope)
        self._queue.append(request)
        if kind == _OOM:
            self._oom[container_id] = request
        self._empty.clear()
        self._filled.set()

    def _drop_one(self) -> None:
        if self._oom:
            dropped = self._oom.pop(next(iter(self._oom)))
            self._queue.remove(dropped)
        else:
            dropped = self._queue.popleft()
        log.warning("event_dropped", topic=dropped.envelope.topic, queued=len(self._queue))

    def _next(self) -> ForwardRequest:
        # Taken out before it is sent: what overflows the queue meanwhile can then only be a later one.
        request = self._queue.popleft()
        for container_id, queued in self._oom.items():
            if queued is request:
                del self._oom[container_id]
                break
        return request

    def try_now(self) -> None:
        """containerd is there, or there will be no other time: do not sit out the pause before the next attempt."""
        self._now.set()

    async def aclose(self, grace_s: float) -> None:
        """Wait until all events are out, at most `grace_s`, and stop."""
        if self._task is None:
            return
        self.try_now()
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
            await self._deliver(self._next())
            if not self._queue:
                self._filled.clear()
                self._empty.set()

    async def _deliver(self, request: ForwardRequest) -> None:
        pause_s, refusals = _FIRST_PAUSE_S, 0
        while True:
            try:
                return await self._send(request)
            except (OSError, RpcError) as err:
                code = err.code if isinstance(err, RpcError) else Code.UNAVAILABLE
                if isinstance(err, (OSError, ConnectionClosed)):
                    await self._disconnect()
                refusals += code not in _NOT_NOW
                if code in _NEVER or refusals == _ATTEMPTS:
                    log.warning("event_refused", topic=request.envelope.topic, error=str(err))
                    return None
                log.debug("event_delayed", topic=request.envelope.topic, error=str(err), retry_s=pause_s)
            # When it calls us, containerd may still be on its way up, with nobody at the socket for events yet.
            pause_s = _FIRST_PAUSE_S if await self._woken(pause_s) else min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _woken(self, pause_s: float) -> bool:
        """Sit out a pause; returns whether `try_now` ended it before its time."""
        self._now.clear()
        try:
            async with asyncio.timeout(pause_s):
                return await self._now.wait()
        except TimeoutError:
            return False

    async def _send(self, request: ForwardRequest) -> None:
        if self._client is None:
            self._client = await Client.connect_unix(self._address)
        await self._client.call(EVENTS.name, EVENTS["Forward"], request)

    async def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

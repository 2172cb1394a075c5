"""The publisher against a containerd that comes, goes and refuses."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
from google.protobuf.empty_pb2 import Empty

from shim import events
from shim.api.gen import events_pb2
from shim.api.services import EVENTS
from shim.events import TOPICS, Publisher
from tests.support.journal import Journal
from ttrpc import Code, RpcError, Server

if TYPE_CHECKING:
    from pathlib import Path

    from shim.api.gen.ttrpc_events_pb2 import ForwardRequest
    from ttrpc import Call


class EventSink:
    """containerd's event service; `refuse` are errors for the next calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.got: Journal[ForwardRequest] = Journal()
        self.refuse: list[RpcError] = []
        self.called: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        self.stalled = asyncio.Event()
        self.stalled.set()

    async def __aenter__(self) -> EventSink:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        self._server = Server()
        self._server.register(EVENTS, {"Forward": self._forward})
        self._serving = asyncio.create_task(self._server.serve(listener))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.aclose()
        await self._serving
        self.path.unlink()

    async def _forward(self, request: ForwardRequest, call: Call) -> Empty:
        if not self.called.done():
            self.called.set_result(call)
        await self.stalled.wait()
        if self.refuse:
            raise self.refuse.pop(0)
        self.got.add(request)
        return Empty()

    async def ids(self, count: int) -> list[str]:
        """The containers of the first so many events."""
        requests = await self.got.until(lambda items: len(items) >= count)
        return [
            events_pb2.TaskPaused.FromString(request.envelope.event.value).container_id
            for request in requests
        ]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(events, "_LONGEST_PAUSE_S", 0.02)


def publish(publisher: Publisher, *ids: str) -> None:
    for container_id in ids:
        publisher.publish(events_pb2.TaskPaused(container_id=container_id))


async def test_envelope(tmp_path: Path) -> None:
    async with EventSink(tmp_path / "s") as sink:
        publisher = Publisher(str(sink.path), "ns")
        publisher.publish(events_pb2.TaskExit(container_id="c", id="e", exit_status=3))
        (request,) = await sink.got.until(lambda items: len(items) == 1)
        await publisher.aclose(1)
    envelope = request.envelope
    assert (envelope.namespace, envelope.topic) == ("ns", "/tasks/exit")
    assert envelope.event.type_url == "containerd.events.TaskExit"  # bare, as containerd has it
    assert events_pb2.TaskExit.FromString(envelope.event.value).exit_status == 3
    assert envelope.timestamp.seconds > 1_600_000_000


def test_every_topic() -> None:
    words = {
        "TaskCreate": "create", "TaskStart": "start", "TaskExit": "exit", "TaskDelete": "delete", "TaskOOM": "oom",
        "TaskExecAdded": "exec-added", "TaskExecStarted": "exec-started", "TaskPaused": "paused",
        "TaskResumed": "resumed",
    }  # fmt: skip
    assert {kind: f"/tasks/{word}" for kind, word in words.items()} == TOPICS


async def test_order(tmp_path: Path) -> None:
    expected = [str(number) for number in range(50)]
    async with EventSink(tmp_path / "s") as sink:
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, *expected)
        assert await sink.ids(50) == expected
        await publisher.aclose(1)


async def test_containerd_comes_late(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path / "s"), "ns")
    publish(publisher, "1", "2")
    async with EventSink(tmp_path / "s") as sink:
        assert await sink.ids(2) == ["1", "2"]
        await publisher.aclose(1)


async def test_containerd_restarts(tmp_path: Path) -> None:
    async with EventSink(tmp_path / "s") as sink:
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, "1")
        assert await sink.ids(1) == ["1"]
    publish(publisher, "2", "3")
    async with EventSink(tmp_path / "s") as sink:
        publish(publisher, "4")
        assert await sink.ids(3) == ["2", "3", "4"]
        await publisher.aclose(1)


@pytest.mark.parametrize(
    "code",
    [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.ABORTED, Code.RESOURCE_EXHAUSTED],
)
async def test_not_now(tmp_path: Path, code: Code) -> None:
    async with EventSink(tmp_path / "s") as sink:
        sink.refuse = [RpcError(code, "busy")] * 7
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, "1", "2")
        assert await sink.ids(2) == ["1", "2"]
        await publisher.aclose(1)


async def test_refused_event_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async with EventSink(tmp_path / "s") as sink:
        sink.refuse = [RpcError(Code.INVALID_ARGUMENT, "what is this?")]
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, "bad", "good")
        assert await sink.ids(1) == ["good"]
        await publisher.aclose(1)


@pytest.mark.parametrize(("refusals", "expected"), [(4, ["1", "2"]), (5, ["2", "3"])])
async def test_any_other_error_is_tried_some_times(
    tmp_path: Path, refusals: int, expected: list[str]
) -> None:
    async with EventSink(tmp_path / "s") as sink:
        sink.refuse = [RpcError(Code.UNKNOWN, "?")] * refusals
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, "1", "2", "3")
        assert await sink.ids(2) == expected
        await publisher.aclose(1)


async def test_containerd_that_stands_still_gets_each_event_once(tmp_path: Path) -> None:
    """It has the event in its socket, and a second copy would arrive as well when it goes on: there is no time limit
    after which one would be sent."""
    async with EventSink(tmp_path / "s") as sink:
        publisher = Publisher(str(sink.path), "ns")
        sink.stalled.clear()
        publish(publisher, "1", "2")
        call = await sink.called
        assert call.deadline is None
        publish(publisher, "3")
        sink.stalled.set()
        assert await sink.ids(3) == ["1", "2", "3"]
        await publisher.aclose(1)


async def test_connection_breaks_in_the_middle(tmp_path: Path) -> None:
    """Whether the event arrived nobody knows: it is sent again, and the others follow in order."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        publisher = Publisher(str(path), "ns")
        publish(publisher, "1", "2")
        for size in (1, 15, 200):  # before, within and after the event
            connected, _ = await asyncio.get_running_loop().sock_accept(listener)
            with connected:
                connected.setblocking(False)
                await asyncio.get_running_loop().sock_recv(connected, size)
        path.unlink()
    async with EventSink(path) as sink:
        assert await sink.ids(2) == ["1", "2"]
        await publisher.aclose(1)


def out_of_memory(publisher: Publisher, *ids: str) -> None:
    for container_id in ids:
        publisher.publish(events_pb2.TaskOOM(container_id=container_id))


async def test_flood_of_out_of_memory_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per container is queued; when that is too much still, they go first."""
    monkeypatch.setattr(events, "_QUEUE_LIMIT", 4)
    publisher = Publisher(str(tmp_path / "s"), "ns")
    publish(publisher, "1")
    out_of_memory(publisher, *["a", "b"] * 1000)
    publish(publisher, "2", "3")
    out_of_memory(publisher, "b")
    publish(publisher, "4")
    async with EventSink(tmp_path / "s") as sink:
        requests = await sink.got.until(lambda items: len(items) == 4)
        assert [request.envelope.topic for request in requests] == ["/tasks/paused"] * 4
        assert await sink.ids(4) == ["1", "2", "3", "4"]
        out_of_memory(publisher, "b", "a")  # none of them is queued any more
        requests = await sink.got.until(lambda items: len(items) == 6)
        assert [request.envelope.topic for request in requests[4:]] == ["/tasks/oom"] * 2
        await publisher.aclose(1)


async def test_closing_sends_what_is_queued(tmp_path: Path) -> None:
    async with EventSink(tmp_path / "s") as sink:
        publisher = Publisher(str(sink.path), "ns")
        publish(publisher, *map(str, range(20)))
        await publisher.aclose(5)
        assert len(sink.got.items) == 20


@pytest.fixture
async def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """A publisher with one event that nobody has taken: it pauses, for longer than a test lasts."""
    monkeypatch.setattr(events, "_FIRST_PAUSE_S", 1000.0)
    paused = asyncio.Event()
    publisher = Publisher(str(tmp_path / "s"), "ns")
    woken = publisher._woken

    async def tell(pause_s: float) -> bool:
        paused.set()
        return await woken(pause_s)

    monkeypatch.setattr(publisher, "_woken", tell)
    publish(publisher, "1")
    await paused.wait()
    return publisher


async def test_call_of_containerds_ends_the_pause(tmp_path: Path, waiting: Publisher) -> None:
    async with EventSink(tmp_path / "s") as sink:
        waiting.try_now()
        assert await sink.ids(1) == ["1"]
        await waiting.aclose(1)


async def test_closing_ends_the_pause(tmp_path: Path, waiting: Publisher) -> None:
    async with EventSink(tmp_path / "s") as sink:
        await waiting.aclose(5)
        assert len(sink.got.items) == 1


async def test_pauses_are_short_again_after_a_call_of_containerds(
    waiting: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    thrice = asyncio.Event()
    monkeypatch.setattr(events, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(events, "_LONGEST_PAUSE_S", 0.05)

    async def note(pause_s: float) -> bool:
        pauses.append(pause_s)
        if len(pauses) == 3:
            thrice.set()
            await asyncio.Event().wait()
        return len(pauses) == 2  # the second one is ended by a call

    monkeypatch.setattr(waiting, "_woken", note)
    waiting.try_now()
    await thrice.wait()
    assert pauses == [0.01, 0.02, 0.01]
    await waiting.aclose(0)


async def test_closing_does_not_wait_for_ever(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path / "nobody"), "ns")
    publish(publisher, "1")
    async with asyncio.timeout(5):
        await publisher.aclose(0.05)


async def test_overflow_loses_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_QUEUE_LIMIT", 3)
    publisher = Publisher(str(tmp_path / "s"), "ns")
    publish(publisher, *"12345")
    async with EventSink(tmp_path / "s") as sink:
        assert await sink.ids(3) == ["3", "4", "5"]
        await publisher.aclose(1)


async def test_no_address() -> None:
    publisher = Publisher("", "ns")
    publish(publisher, "1")
    await publisher.aclose(5)

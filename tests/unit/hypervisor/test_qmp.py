"""The handshake and the commands, against a monitor that misbehaves in every way seen in the field."""

from __future__ import annotations

import asyncio
import contextlib
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HostUnsupported, QmpRefused, QmpUnavailable
from hypervisor.process import ProcessExit
from hypervisor.qemu.events import BalloonChanged, Event, Shutdown
from hypervisor.qemu.qmp import Monitor, connected
from hypervisor.sockets import unix_listener
from hypervisor.spec import QmpTimeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    Behaviour = Callable[["Peer"], Awaitable[None]]

QUICK = QmpTimeouts(read_timeout_s=0.1, connect_timeout_s=3.0, retry_pause_s=0.01, command_timeout_s=0.2)
GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}
}


class Peer:
    """QEMU's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, message: Mapping[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    async def receive(self) -> dict[str, Any]:
        """One message; like QEMU, without asking for a line's end."""
        text = ""
        while True:
            data = await self.reader.read(4096)
            if not data:
                raise EOFError
            text += data.decode()
            with contextlib.suppress(json.JSONDecodeError):
                message: dict[str, Any] = json.loads(text)
                return message

    async def answer(self, **reply: Any) -> str:
        message = await self.receive()
        self.send({**(reply or {"return": {}}), "id": message.get("id")})
        return str(message["execute"])


async def greets(peer: Peer) -> None:
    peer.send(GREETING)
    assert await peer.answer() == "qmp_capabilities"


async def greets_and_stays(peer: Peer) -> None:
    await greets(peer)
    await peer.reader.read()


async def silent(peer: Peer) -> None:
    await peer.reader.read()


async def drops(peer: Peer) -> None:
    pass


async def drops_after_greeting(peer: Peer) -> None:
    peer.send(GREETING)
    await peer.receive()


async def garbage(peer: Peer) -> None:
    peer.writer.write(b"\x00\xffnot json\r\n")
    await peer.reader.read()


async def wrong_greeting(peer: Peer) -> None:
    peer.send({"hello": "I am something else"})
    await peer.reader.read()


async def endless_line(peer: Peer) -> None:
    peer.writer.write(b"x" * (2 << 20))
    await peer.reader.read()


async def refuses_capabilities(peer: Peer) -> None:
    peer.send(GREETING)
    await peer.answer(error={"class": "CommandNotFound", "desc": "no"})
    await peer.reader.read()


MISBEHAVIOURS: list[Behaviour] = [
    silent,
    drops,
    drops_after_greeting,
    garbage,
    wrong_greeting,
    endless_line,
    refuses_capabilities,
]


class Monitors:
    """A fake QEMU's monitor: each connection gets the next behaviour, the last one again and again."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = behaviours
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behaviour = self.behaviours[min(self.connections, len(self.behaviours) - 1)]
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await behaviour(Peer(reader, writer))
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.tasks.discard(task)
            writer.close()


@asynccontextmanager
async def monitors_at(path: Path, *behaviours: Behaviour) -> AsyncIterator[Monitors]:
    monitors = Monitors(*behaviours)
    server = await asyncio.start_unix_server(monitors.accept, sock=unix_listener(path))
    try:
        yield monitors
    finally:
        server.close()
        for task in [*monitors.tasks]:
            task.cancel()
        await asyncio.sleep(0)
        await server.wait_closed()


def running() -> asyncio.Future[ProcessExit]:
    return asyncio.get_running_loop().create_future()


def ignore(event: Event) -> None:
    pass


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS, ids=lambda b: b.__name__)
async def test_the_handshake_is_retried_as_a_whole(tmp_path: Path, misbehaviour: Behaviour) -> None:
    path = tmp_path / "qmp.sock"
    async with (
        monitors_at(path, misbehaviour, misbehaviour, greets_and_stays) as monitors,
        connected(path, QUICK, running(), ignore),
    ):
        assert monitors.connections == 3


@pytest.mark.parametrize(
    ("misbehaviour", "problem"),
    [
        (silent, "no answer within 100 ms"),
        (drops, "EOFError"),
        (garbage, "Did not understand Greeting"),
        (refuses_capabilities, "Negotiation failed"),
    ],
)
async def test_giving_up_names_the_socket_and_the_last_problem(
    tmp_path: Path, misbehaviour: Behaviour, problem: str
) -> None:
    path = tmp_path / "qmp.sock"
    patience = QmpTimeouts(read_timeout_s=0.1, connect_timeout_s=0.4, retry_pause_s=0.01)
    async with monitors_at(path, misbehaviour) as monitors:
        began = asyncio.get_running_loop().time()
        with pytest.raises(QmpUnavailable) as refused:
            async with connected(path, patience, running(), ignore):
                pass
        assert 0.35 < asyncio.get_running_loop().time() - began < 2
        assert monitors.connections >= 2
    message = str(refused.value)
    assert str(path) in message
    assert problem in message
    assert "within 0.4 s" in message
    assert "\n" not in message


async def test_hanging_up_right_after_the_handshake_is_an_ordinary_failure(tmp_path: Path) -> None:
    """Whether it shows as a failed handshake or as a broken connection is a race; it is never anything else."""
    path = tmp_path / "qmp.sock"
    patience = QmpTimeouts(read_timeout_s=1, connect_timeout_s=0.02, retry_pause_s=0)
    outcomes = []
    async with monitors_at(path, greets):
        for _ in range(30):
            try:
                async with connected(path, patience, running(), ignore) as monitor:
                    await monitor.stop()
            except QmpUnavailable as err:
                outcomes.append(str(err))
    assert len(outcomes) == 30


async def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    patience = QmpTimeouts(read_timeout_s=0.1, connect_timeout_s=0.1, retry_pause_s=0.01)
    with pytest.raises(QmpUnavailable, match="cannot connect: No such file"):
        async with connected(path, patience, running(), ignore):
            pass


async def test_the_end_of_qemu_ends_the_handshake_at_once(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    patience = QmpTimeouts(read_timeout_s=1000, connect_timeout_s=1000)
    exited = running()
    async with monitors_at(path, silent):
        asyncio.get_running_loop().call_later(0.02, exited.set_result, ProcessExit(1, None))
        with pytest.raises(QmpUnavailable, match="ended before"):
            async with asyncio.timeout(2), connected(path, patience, exited, ignore):
                pass


async def test_a_long_path_is_no_problem(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    async with (
        monitors_at(folder / "qmp.sock", greets_and_stays),
        connected(folder / "qmp.sock", QUICK, running(), ignore),
    ):
        assert (folder / "qmp.sock").stat().st_mode & 0o777 == 0o600


COMMANDS: list[tuple[str, Callable[[Monitor], Awaitable[object]]]] = [
    ("stop", Monitor.stop),
    ("cont", Monitor.cont),
    ("quit", Monitor.quit),
    ("system_powerdown", Monitor.system_powerdown),
]


@pytest.mark.parametrize(("name", "call"), COMMANDS, ids=[name for name, _ in COMMANDS])
async def test_commands(tmp_path: Path, name: str, call: Callable[[Monitor], Awaitable[object]]) -> None:
    heard: list[str] = []

    async def one_command(peer: Peer) -> None:
        await greets(peer)
        heard.append(await peer.answer())
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, one_command), connected(path, QUICK, running(), ignore) as monitor:
        await call(monitor)
    assert heard == [name]


@pytest.mark.parametrize(
    ("reply", "status"), [({"status": "paused", "running": False}, "paused"), ({}, None), ([], None)]
)
async def test_query_status(tmp_path: Path, reply: object, status: str | None) -> None:
    async def answers(peer: Peer) -> None:
        await greets(peer)
        await peer.answer(**{"return": reply})
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, answers), connected(path, QUICK, running(), ignore) as monitor:
        if status is None:
            with pytest.raises(QmpUnavailable, match="without a status"):
                await monitor.query_status()
        else:
            assert await monitor.query_status() == status


async def test_a_refused_command_keeps_qemus_words(tmp_path: Path) -> None:
    async def refuses(peer: Peer) -> None:
        await greets(peer)
        await peer.answer(error={"class": "GenericError", "desc": "Resetting the machine is required"})
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, refuses), connected(path, QUICK, running(), ignore) as monitor:
        with pytest.raises(QmpRefused) as refused:
            await monitor.cont()
    assert str(refused.value) == "QEMU refused cont: Resetting the machine is required (GenericError)"
    assert (refused.value.command, refused.value.kind) == ("cont", "GenericError")


async def test_a_command_without_an_answer_has_a_limit(tmp_path: Path) -> None:
    async def deaf(peer: Peer) -> None:
        await greets(peer)
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, deaf), connected(path, QUICK, running(), ignore) as monitor:
        with pytest.raises(QmpUnavailable, match=r"did not answer stop within 0\.2 s"):
            await monitor.stop()


async def test_a_lost_connection_fails_the_command_in_flight_and_later_ones(tmp_path: Path) -> None:
    async def hangs_up(peer: Peer) -> None:
        await greets(peer)
        await peer.receive()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, hangs_up), connected(path, QUICK, running(), ignore) as monitor:
        for _ in range(2):
            with pytest.raises(QmpUnavailable, match="is gone, cannot stop"):
                await monitor.stop()


async def test_garbage_in_mid_connection_does_not_disturb_the_end(tmp_path: Path) -> None:
    async def turns_mad(peer: Peer) -> None:
        await greets(peer)
        await peer.receive()
        peer.writer.write(b"\xff\xfe[[[\r\n")
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, turns_mad), connected(path, QUICK, running(), ignore) as monitor:
        with pytest.raises(QmpUnavailable, match="is gone, cannot stop"):
            await monitor.stop()


async def test_events_are_passed_on(tmp_path: Path) -> None:
    """Those that somebody knows, and are what they should be; each to everybody who listens at that time."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    others: list[Event] = []

    async def tells(peer: Peer) -> None:
        await greets(peer)
        stamp = {"seconds": 1, "microseconds": 2}
        peer.send({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": stamp})
        peer.send({"event": "RESUME", "timestamp": stamp})
        peer.send({"event": "SHUTDOWN", "data": ["odd"], "timestamp": stamp})
        await peer.answer()
        peer.send({"event": "BALLOON_CHANGE", "data": {"actual": 1 << 30}, "timestamp": stamp})
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, tells), connected(path, QUICK, running(), events.put_nowait) as monitor:
        assert await events.get() == Shutdown(guest=True, reason="guest-reset")
        with monitor.listening(others.append):
            await monitor.stop()
            assert await events.get() == BalloonChanged(actual=1 << 30)
        assert others == [BalloonChanged(actual=1 << 30)]


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ({"major": 5, "minor": 0, "micro": 0}, (5, 0, 0)),
        ({"major": 11, "minor": 1, "micro": 2}, (11, 1, 2)),
        (
            {"major": 4, "minor": 2, "micro": 1},
            r"QEMU 4\.2\.1 is too old; install 5\.0 or later, or name one as path",
        ),
    ],
)
async def test_the_greeting_tells_the_version(
    tmp_path: Path, version: dict[str, int], outcome: tuple[int, ...] | str
) -> None:
    async def is_of_that_version(peer: Peer) -> None:
        peer.send({"QMP": {"version": {"qemu": version, "package": ""}, "capabilities": []}})
        await peer.answer()
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, is_of_that_version):
        if isinstance(outcome, str):
            with pytest.raises(HostUnsupported, match=outcome):
                async with connected(path, QUICK, running(), ignore):
                    pass
        else:
            async with connected(path, QUICK, running(), ignore) as monitor:
                assert monitor.version == outcome


@pytest.mark.parametrize("qemu", [None, "7.2", {"major": "7"}, {"major": 7, "minor": 2}])
async def test_a_greeting_without_a_version_is_told(tmp_path: Path, qemu: object) -> None:
    async def is_odd(peer: Peer) -> None:
        peer.send({"QMP": {"version": {"qemu": qemu}, "capabilities": []}})
        await peer.answer()
        await peer.reader.read()

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, is_odd):
        with pytest.raises(QmpUnavailable, match="without a version"):
            async with connected(path, QUICK, running(), ignore):
                pass


async def test_a_command_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """What QEMU gets in between would belong to neither."""
    heard: list[str] = []

    async def is_slow(peer: Peer) -> None:
        await greets(peer)
        while True:
            message = await peer.receive()
            heard.append(message["execute"])
            await asyncio.sleep(0.02)
            heard.append("answered")
            peer.send({"return": {}, "id": message["id"]})

    path = tmp_path / "qmp.sock"
    async with monitors_at(path, is_slow), connected(path, QUICK, running(), ignore) as monitor:
        await asyncio.gather(monitor.stop(), monitor.cont())
    assert heard == ["stop", "answered", "cont", "answered"]

"""A peer that speaks D-Bus over a real socket, as a bus with systemd behind it, or as systemd itself, does."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jeepney import DBusAddress, HeaderFields, Message, MessageType, Parser, new_method_return, new_signal
from jeepney.wrappers import new_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_BEGIN = b"BEGIN\r\n"
_MANAGER = DBusAddress("/org/freedesktop/systemd1", interface="org.freedesktop.systemd1.Manager")
_JOB = "/org/freedesktop/systemd1/job/7"
_OTHER_JOB = "/org/freedesktop/systemd1/job/6"


class FakeSystemd:
    """`calls` is what it was asked. `refusals` has an error's name and text by method; `result` is that of jobs.

    `made` is called with each unit that starts. `silent` methods get no answer but the end of the connection. With a
    `stranger` on the bus, that one sends signals too.
    """

    def __init__(self, path: Path) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.refusals: dict[str, tuple[str, str]] = {}
        self.result = "done"
        self.job_ends_first = False
        self.stranger = False
        self.silent: set[str] = set()
        self.made: Callable[[str], None] = lambda _unit: None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._serial = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeSystemd:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def asked(self, method: str) -> list[tuple[Any, ...]]:
        return [body for name, body in self.calls if name == method]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # shut down
                return
            with connection, suppress(OSError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        said = b""
        while _BEGIN not in said:
            data = connection.recv(4096)
            if not data:
                return
            asked = said.count(b"\r\n")
            said += data
            if asked == 0 and b"\r\n" in said:
                connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
        parser = Parser()
        data = said.partition(_BEGIN)[2]  # the first message may have come with it
        while True:
            parser.add_data(data)
            while (message := parser.get_next_message()) is not None:
                for answer in self._answers(message):
                    self._serial += 1
                    connection.sendall(answer.serialise(serial=self._serial))
                if message.header.fields[HeaderFields.member] in self.silent:
                    return
            if not (data := connection.recv(4096)):
                return

    def _answers(self, message: Message) -> list[Message]:
        assert message.header.message_type == MessageType.method_call
        method = message.header.fields[HeaderFields.member]
        self.calls.append((method, tuple(message.body)))
        if method in self.silent:
            return []
        if method in self.refusals:
            name, text = self.refusals[method]
            return [new_error(message, name, "s", (text,))]
        if method == "Hello":
            return [new_method_return(message, "s", (":1.5",))]
        if method not in ("StartTransientUnit", "StopUnit"):
            return [new_method_return(message)]
        unit = message.body[0]
        if method == "StartTransientUnit":
            self.made(unit)
        other = self._job_removed(6, _OTHER_JOB, "other.service", "failed")
        ended = self._job_removed(7, _JOB, unit, self.result)
        reply = new_method_return(message, "o", (_JOB,))
        if self.stranger:
            return [*_lies(), reply, ended]
        return [other, ended, reply] if self.job_ends_first else [reply, other, ended]

    def _job_removed(self, number: int, job: str, unit: str, result: str) -> Message:
        return new_signal(_MANAGER, "JobRemoved", "uoss", (number, job, unit, result))


def _lies() -> list[Message]:
    """Of somebody else than systemd: one that has another form, and one about the job."""
    lies = [
        new_signal(_MANAGER, "JobRemoved", "s", ("x",)),
        new_signal(_MANAGER, "JobRemoved", "uoss", (7, _JOB, "x.scope", "canceled")),
    ]
    for each in lies:
        each.header.fields[HeaderFields.sender] = ":1.66"
    return lies

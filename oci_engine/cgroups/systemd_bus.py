"""What systemd is asked over D-Bus: to make, change and stop units. Raises SetupFailed with systemd's own words.

The library for D-Bus is loaded here alone, when somebody asks for groups by systemd.
"""

from __future__ import annotations

import os
import time

from oci_engine.errors import SetupFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from types import TracebackType

    from jeepney import Message

    #: Name, signature and value, as D-Bus wants properties.
    Property = tuple[str, tuple[str, object]]

_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
#: Root may ask systemd itself where there is no bus, as in containers and early at boot.
_PRIVATE = "/run/systemd/private"
_DEFAULT_BUS = "unix:path=/run/dbus/system_bus_socket"
_AUTH_TIMEOUT_S = 5.0
#: systemd's own limit for the start and the stop of a unit is 90 s.
_TIMEOUT_S = 120.0
_CHUNK = 1 << 16

NO_SUCH_UNIT = f"{_NAME}.NoSuchUnit"
UNIT_EXISTS = f"{_NAME}.UnitExists"


class Refused(SetupFailed):
    """systemd's answer is an error; `name` is the error's."""

    def __init__(self, call: str, name: str, text: str) -> None:
        super().__init__(f"systemd: {call}: {text or name}")
        self.name = name


class Bus:
    """A connection, for the length of a block."""

    def __enter__(self) -> Bus:
        from jeepney import Parser

        self._parser = Parser()
        self._serial = 0
        #: systemd's own name on the bus, by its last answer.
        self._systemd = ""
        #: Of jobs that have ended: what became of them.
        self._results: dict[str, str] = {}
        self._socket, self._is_bus = _connect()
        try:
            if self._is_bus:
                self._call("Hello", path="/org/freedesktop/DBus", name="org.freedesktop.DBus")
                rule = f"type='signal',interface='{_MANAGER}',member='JobRemoved',path='{_PATH}'"
                self._call("AddMatch", "s", rule, path="/org/freedesktop/DBus", name="org.freedesktop.DBus")
            self._call("Subscribe")
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def start(self, unit: str, properties: Sequence[Property]) -> None:
        """A transient unit. Returns when it is there. Raises Refused with UNIT_EXISTS."""
        job = self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "replace", [*properties], [])[0]
        self._wait_for(str(job), f"starting {unit}")

    def stop(self, unit: str) -> None:
        """Returns when it is gone. Raises Refused with NO_SUCH_UNIT."""
        job = self._call("StopUnit", "ss", unit, "replace")[0]
        self._wait_for(str(job), f"stopping {unit}")

    def change(self, unit: str, properties: Sequence[Property]) -> None:
        """Until the next boot: the unit does not last longer."""
        self._call("SetUnitProperties", "sba(sv)", unit, True, [*properties])

    def _wait_for(self, job: str, what: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while job not in self._results:
            self._receive(deadline, what)
        result = self._results.pop(job)
        if result not in ("done", "skipped"):
            raise SetupFailed(f"systemd: {what}: its job ended with {result!r}; see journalctl")

    def _call(
        self, method: str, signature: str = "", *arguments: object, path: str = _PATH, name: str = _NAME
    ) -> tuple[object, ...]:
        from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call

        interface = _MANAGER if name == _NAME else name
        address = DBusAddress(path, bus_name=name, interface=interface)
        message = new_method_call(address, method, signature or None, arguments)
        self._serial += 1
        try:
            self._socket.sendall(message.serialise(serial=self._serial))
        except OSError as err:
            raise SetupFailed(f"systemd: {method}: the connection over D-Bus broke: {err.strerror}") from None
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            reply = self._receive(deadline, method)
            if reply.header.fields.get(HeaderFields.reply_serial) != self._serial:
                continue
            if name == _NAME:
                self._systemd = _sender(reply)
            if reply.header.message_type == MessageType.error:
                error = str(reply.header.fields.get(HeaderFields.error_name, ""))
                raise Refused(method, error, str(reply.body[0]) if reply.body else "")
            return tuple(reply.body)

    def _receive(self, deadline: float, what: str) -> Message:
        """The next message. Of a job that has ended the result is kept."""
        from jeepney import HeaderFields

        while (message := self._parser.get_next_message()) is None:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                data = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise SetupFailed(f"systemd: {what}: no answer within {_TIMEOUT_S:.0f} s") from None
            except OSError as err:
                raise SetupFailed(
                    f"systemd: {what}: the connection over D-Bus broke: {err.strerror}"
                ) from None
            if not data:
                raise SetupFailed(f"systemd: {what}: the other end closed the connection over D-Bus")
            self._parser.add_data(data)
        fields = message.header.fields
        is_news = (
            fields.get(HeaderFields.member) == "JobRemoved" and fields.get(HeaderFields.interface) == _MANAGER
        )
        # Anybody on a bus may send a signal to anybody.
        if is_news and (not self._is_bus or _sender(message) == self._systemd):
            _, job, _, result = message.body
            self._results[str(job)] = str(result)
        return message


def _sender(message: Message) -> str:
    """As the bus says; empty where there is none."""
    from jeepney import HeaderFields

    return str(message.header.fields.get(HeaderFields.sender, ""))


def _connect() -> tuple[socket.socket, bool]:
    """A socket on which messages may be sent, and whether there is a bus at its other end, or systemd itself."""
    from jeepney.bus import parse_addresses

    problems = []
    given = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _DEFAULT_BUS
    places = [_path_of(kind, words) for kind, words in parse_addresses(given)]
    for place, is_bus in (*((each, True) for each in places if each), (_PRIVATE, False)):
        try:
            return _introduced(place), is_bus
        except OSError as err:
            problems.append(f"{place.replace(chr(0), '@')}: {err.strerror or err}")
    raise SetupFailed(
        f"--systemd-cgroup: systemd cannot be reached over D-Bus ({'; '.join(problems)}); is it this host's init?"
    )


def _introduced(place: str) -> socket.socket:
    """Connected, with the other end knowing who calls. Raises OSError.

    All is said at once, as systemd's own programs do. A first message that comes in one packet with the end of the
    introduction, as it may when there is an answer to wait for in between, systemd does not look at until a second one.
    """
    import socket

    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(_AUTH_TIMEOUT_S)
        connection.connect(place)
        connection.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        said = b""
        while not said.endswith(b"\r\n"):
            data = connection.recv(_CHUNK)
            if not data:
                raise ConnectionResetError(104, "closed by the other end")
            said += data
        if not said.startswith(b"OK "):
            raise PermissionError(13, f"refused: {said.decode(errors='replace').strip()}")
    except BaseException:
        connection.close()
        raise
    return connection


def _path_of(kind: str, words: dict[str, str]) -> str:
    """Of a socket on this machine; empty for other kinds of addresses."""
    if kind != "unix":
        return ""
    return words.get("path") or ("\0" + words["abstract"] if "abstract" in words else "")

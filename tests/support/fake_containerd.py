"""containerd as a shim sees it: runs the program, calls its Task service, takes its events.

The program is the real one, started by the launcher that an installation has.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import sys
import sysconfig
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.any_pb2 import Any as ProtoAny
from google.protobuf.empty_pb2 import Empty
from google.protobuf.symbol_database import Default
from launcher import SHIM_SOURCE, render, write

from shim.api.gen import bootstrap_pb2, events_pb2, runtimeoptions_pb2, task_v2_pb2
from shim.api.services import EVENTS, TASK_V2, TASK_V3
from tests.support import bundles, host
from tests.support.journal import PATIENCE_S, Journal
from ttrpc import Client, ConnectionClosed, RpcError, Server

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from shim.api.gen.ttrpc_events_pb2 import ForwardRequest
    from ttrpc import Call

REPOSITORY = Path(__file__).resolve().parents[2]
SOCKET_DIR = Path("/run/containerd/s")
NAMESPACE = "fake"
_PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"


class Dialect(Enum):
    """How containerd tells `start` about the pod, beside the flags."""

    NOTHING = "no stdin"
    OPTIONS = "runtime options, up to 2.2"
    PARAMS = "BootstrapParams, from 2.3 on"


class Answer(NamedTuple):
    """What the program did. `output` has stdout and, for `start`, stderr mixed in, as containerd reads it."""

    code: int
    output: bytes
    errors: str = ""


class Event(NamedTuple):
    """One event as it arrived."""

    topic: str
    namespace: str
    body: Any


class Shim:
    """One running shim and the connection to its Task service."""

    def __init__(
        self, container_id: str, bundle: Path, address: str, client: Client, *, version: int
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.address = address
        self.client = client
        self.pid = 0
        self._service = {2: TASK_V2, 3: TASK_V3}[version]

    async def call(self, verb: str, **fields: Any) -> Any:
        """One call of the Task service; the id is the sandbox's unless given. Raises RpcError."""
        method = self._service[verb]
        request = method.request(**{"id": self.id, **fields})
        return await self.client.call(self._service.name, method, request)

    async def create(self, container_id: str = "", *, bundle: Path | None = None, **fields: Any) -> Any:
        """`Create`, by default of the sandbox's own container."""
        return await self.call(
            "Create", id=container_id or self.id, bundle=str(bundle or self.bundle), **fields
        )

    async def exec(self, exec_id: str, process: dict[str, Any], **fields: Any) -> Any:
        """`Exec` of an OCI process; `Start` runs it."""
        spec = ProtoAny(type_url=_PROCESS_URL, value=json.dumps(process).encode())
        return await self.call("Exec", exec_id=exec_id, spec=spec, **fields)

    async def connect(self) -> None:
        """Ask for the daemon's process id, as containerd does."""
        self.pid = (await self.call("Connect")).shim_pid

    async def shutdown(self, *, now: bool = False) -> None:
        """`Shutdown` that ends the daemon, and its end."""
        await self.call("Shutdown", now=now)
        await host.ended(self.pid)


class FakeContainerd:
    """One containerd with its own program folder, address and events. An async context manager."""

    def __init__(self, folder: Path, config: Path, watch: host.HostWatch) -> None:
        self.folder = folder
        self.config = config
        self.address = str(folder / "containerd.sock")
        self.events: Journal[Event] = Journal()
        self.shims: list[Shim] = []
        self.offered_events: Journal[str] = Journal()
        """The topics of all events that came, also of those that were not taken."""
        self.refuse_events: list[RpcError] = []
        """The answers to the next events."""
        self.take_events = asyncio.Event()
        """Cleared, events are read and not answered, as by a containerd that stands still."""
        self.take_events.set()
        self._events_path = folder / "events.sock"
        self._events_server: tuple[Server, asyncio.Task[None]] | None = None
        self._watch = watch
        self.program = folder / "bin" / "containerd-shim-kata-py-v2"
        places = (REPOSITORY, Path(sysconfig.get_path("purelib")))
        write(self.program, render(SHIM_SOURCE, python=Path(sys.executable), folders=places))

    async def __aenter__(self) -> FakeContainerd:
        self.serve_events()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for shim in self.shims:
            await shim.client.aclose()
        await self.stop_events()

    def serve_events(self) -> None:
        """Open the socket for events."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._events_path))
        listener.listen()
        server = Server()
        server.register(EVENTS, {"Forward": self._forward})
        self._events_server = server, asyncio.create_task(server.serve(listener))

    async def stop_events(self) -> None:
        """Go away, as containerd does when it is restarted. Harmless when repeated."""
        if self._events_server is not None:
            server, serving = self._events_server
            self._events_server = None
            await server.aclose()
            await serving
            self._events_path.unlink()

    async def _forward(self, request: ForwardRequest, call: Call) -> Empty:
        self.offered_events.add(request.envelope.topic)
        await self.take_events.wait()
        if self.refuse_events:
            raise self.refuse_events.pop(0)
        envelope = request.envelope
        body = Default().GetSymbol(envelope.event.type_url)()
        body.ParseFromString(envelope.event.value)
        assert envelope.timestamp.seconds > 0
        self.events.add(Event(envelope.topic, envelope.namespace, body))
        return Empty()

    async def event(self, kind: type[Message], nth: int = 1, **fields: Any) -> Any:
        """The nth event of a kind whose fields have these values, once it has come."""

        def matching(items: list[Event]) -> list[Any]:
            bodies = [item.body for item in items if isinstance(item.body, kind)]
            return [b for b in bodies if all(getattr(b, name) == value for name, value in fields.items())]

        return matching(await self.events.until(lambda items: len(matching(items)) >= nth))[nth - 1]

    def socket_of(self, sandbox_id: str, folder: Path = SOCKET_DIR, *, namespace: str = NAMESPACE) -> Path:
        """Where a sandbox's shim listens."""
        name = f"{self.address}/{namespace}/{sandbox_id}"
        return folder / hashlib.sha256(name.encode()).hexdigest()

    def bundle(self, container_id: str, config: dict[str, Any]) -> Path:
        """A new bundle."""
        return bundles.make_bundle(self.folder / "bundles" / container_id, config)

    async def run(
        self, action: str, container_id: str, bundle: Path, *, stdin: bytes | None = None, flags: tuple[str, ...] = ()
    ) -> Answer:  # fmt: skip
        """The program as containerd runs it, to the end of all copies of its output."""
        self._watch.expect(container_id, self.socket_of(container_id))
        argv = (
            str(self.program), "-namespace", NAMESPACE, "-address", self.address, "-publish-binary", "/bin/true",
            "-id", container_id, *flags, action,
        )  # fmt: skip
        environment = {
            **os.environ, "TTRPC_ADDRESS": str(self._events_path), "GRPC_ADDRESS": self.address,
            "NAMESPACE": NAMESPACE, "MAX_SHIM_VERSION": "2", "GOMAXPROCS": "2", "KATA_CONF_FILE": str(self.config),
        }  # fmt: skip
        return await program_answer(*argv, stdin=stdin, cwd=bundle, env=environment, mixed=action == "start")

    def options(self, config: Path | None = None) -> bytes:
        """Runtime options that name a configuration file, as containerd writes them to stdin."""
        options = runtimeoptions_pb2.Options(config_path=str(config or self.config))
        packed = ProtoAny(type_url="runtimeoptions.v1.Options", value=options.SerializeToString())
        return packed.SerializeToString()

    def params(self, container_id: str, *, socket_dir: Path | None = None) -> bytes:
        """BootstrapParams as containerd writes them to stdin."""
        params = bootstrap_pb2.BootstrapParams(
            instance_id=container_id,
            namespace=NAMESPACE,
            containerd_version="2.3.0",
            containerd_ttrpc_address=str(self._events_path),
            containerd_grpc_address=self.address,
            containerd_binary="/bin/true",
        )
        params.extensions.add().value.ParseFromString(self.options())
        if socket_dir is not None:
            params.socket_dir = str(socket_dir)
        return params.SerializeToString()

    async def start(
        self, container_id: str, bundle: Path, *, dialect: Dialect = Dialect.NOTHING, version: int = 2
    ) -> Shim:
        """`start` and connect, as containerd does for a new task. Raises AssertionError when it failed."""
        stdin = {
            Dialect.NOTHING: None,
            Dialect.OPTIONS: self.options(),
            Dialect.PARAMS: self.params(container_id),
        }[dialect]
        answer = await self.run("start", container_id, bundle, stdin=stdin)
        assert answer.code == 0, answer.output
        if dialect is Dialect.PARAMS:
            address = bootstrap_pb2.BootstrapResult.FromString(answer.output).address
        else:
            address = answer.output.decode()
        return await self.connect(container_id, bundle, address, version=version)

    async def connect(self, container_id: str, bundle: Path, address: str, *, version: int = 2) -> Shim:
        """A connection to a shim that has been started."""
        client = await Client.connect_unix(address.removeprefix("unix://"))
        shim = Shim(container_id, bundle, address, client, version=version)
        self.shims.append(shim)
        await shim.connect()
        return shim

    async def delete(self, container_id: str, bundle: Path) -> task_v2_pb2.DeleteResponse:
        """`delete`, as containerd runs it after a shim's end. Raises AssertionError when it failed."""
        answer = await self.run("delete", container_id, bundle, flags=("-bundle", str(bundle)))
        assert (answer.code, answer.errors) == (0, "")
        return task_v2_pb2.DeleteResponse.FromString(answer.output)

    async def stop_all(self) -> None:
        """Shut down what still runs, and wait until the daemons are gone."""
        for shim in self.shims:
            if not shim.client.closed:
                with suppress(ConnectionClosed):  # it was ending anyway
                    await shim.call("Shutdown", now=True)
        async with asyncio.timeout(PATIENCE_S):
            for shim in self.shims:
                await host.ended(shim.pid)


async def program_answer(
    *argv: str | Path,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    mixed: bool = False,
) -> Answer:
    """Run a program to the end of all copies of its output; `mixed` takes stderr for stdout as well."""
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=env,
        stdin=null if stdin is None else pipe,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT if mixed else pipe,
    )
    output, errors = await process.communicate(stdin)
    assert process.returncode is not None
    return Answer(process.returncode, output, (errors or b"").decode())


def task_events(events: list[Event]) -> list[tuple[str, str]]:
    """Topic and id (of the exec, else of the container) of each event."""
    return [(event.topic, _id_of(event.body)) for event in events]


def _id_of(body: Any) -> str:
    if isinstance(body, (events_pb2.TaskExit, events_pb2.TaskDelete)):
        return body.id or body.container_id
    return getattr(body, "exec_id", "") or str(body.container_id)

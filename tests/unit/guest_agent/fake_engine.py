"""Runs the programs of specifications as plain processes, for tests of everything around an engine."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from guest_agent.engine import Started
from guest_agent.errors import EngineFailed, NotFound
from guest_agent.stdio import Stdio

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from guest_agent.reaper import Reaper

#: Waits for a line on descriptor 9, then becomes the program.
_WAITING = 'read go <&9; exec 9<&-; exec "$@"'


class FakeEngine:
    """Runs the programs of specifications as plain processes of this host."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._start_fds: dict[str, int] = {}
        self.pids: dict[str, list[int]] = {}
        self.calls: list[str] = []
        self.failing: set[str] = set()
        self.hold: asyncio.Event | None = None
        self.on_create: Callable[[str], None] | None = None

    def prepare(self) -> None:
        self.calls.append("prepare")

    async def _called(self, verb: str, container_id: str) -> None:
        self.calls.append(f"{verb} {container_id}")
        if self.hold is not None:
            await self.hold.wait()
        if verb in self.failing:
            raise EngineFailed(f"{verb} was told to fail")

    async def create(self, container_id: str, bundle: str, *, terminal: bool, pipe_size: int) -> Started:
        if self.on_create is not None:
            self.on_create(container_id)
        await self._called("create", container_id)
        with open(f"{bundle}/config.json") as file:
            args = json.load(file)["process"]["args"]
        reading, self._start_fds[container_id] = os.pipe()
        return self._spawn(container_id, ["sh", "-c", _WAITING, "sh", *args], reading)

    def _spawn(self, container_id: str, argv: list[str], waits_on: int | None) -> Started:
        stdio, theirs = Stdio.pipes()
        with theirs:
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(theirs.fds)]
            if waits_on is not None:
                actions.append((os.POSIX_SPAWN_DUP2, waits_on, 9))
            pid = os.posix_spawnp(argv[0], argv, dict(os.environ), file_actions=actions)
        if waits_on is not None:
            os.close(waits_on)
        self.pids.setdefault(container_id, []).append(pid)
        return Started(pid, self._reaper.watch(pid), stdio)

    async def start(self, container_id: str) -> None:
        self.calls.append(f"start {container_id}")
        if "start" in self.failing:
            raise NotFound("nothing waits")
        os.write(self._start_fds[container_id], b"\n")

    async def exec(
        self, container_id: str, process: dict[str, Any], *, terminal: bool, pipe_size: int
    ) -> Started:
        await self._called("exec", container_id)
        return self._spawn(container_id, process["args"], None)

    async def update(self, container_id: str, resources: dict[str, Any]) -> None:
        await self._called("update", container_id)

    async def delete_with_hooks(self, container_id: str) -> None:
        await self._called("delete_with_hooks", container_id)

    def forget(self, container_id: str) -> None:
        self.calls.append(f"forget {container_id}")
        fd = self._start_fds.pop(container_id, None)
        if fd is not None:
            os.close(fd)

    def kill_all(self, container_id: str) -> None:
        for pid in self.pids.get(container_id, ()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for container_id in list(self._start_fds):
            self.forget(container_id)
        for container_id in self.pids:
            self.kill_all(container_id)


def container_request(container_id: str, *args: str, rootfs: str = "/rootfs") -> pb.CreateContainerRequest:
    process = oci_pb2.Process(Args=args, Cwd="/", User=oci_pb2.User())
    spec = oci_pb2.Spec(Process=process, Root=oci_pb2.Root(Path=rootfs))
    return pb.CreateContainerRequest(container_id=container_id, OCI=spec)

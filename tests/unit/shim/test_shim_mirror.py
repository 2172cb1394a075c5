"""Volumes that a kubelet changes: what is sent to the guest, when, and what is shared without a copy."""

from __future__ import annotations

import asyncio
import os
import resource
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from guest_agent.mirror import Mirrors as GuestMirrors
from shim import mirror as mirror_module
from shim.directory_watch import DirectoryWatch
from shim.kubelet_files import LIMIT_FILE_BYTES, LIMIT_FILES, NotMirrored, Unsteady, pieces
from shim.mirror import Mirrors
from shim.oci import is_kubelets
from tests.support.atomic_writer import AtomicWriter
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    from agent_proto.gen.kata_py_agent_pb2 import RemoveMirrorRequest, UpdateMirrorRequest


class Agent:
    """The guest's agent, whose copies are in a folder of this host. `failures` are raised by the next calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: list[Exception] = []
        self.calls = 0
        self.changed = asyncio.Condition()
        self._mirrors = GuestMirrors(str(folder))

    async def update_mirror(self, request: UpdateMirrorRequest) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        await self._mirrors.update(request)
        await self._tell()

    async def remove_mirror(self, request: RemoveMirrorRequest) -> None:
        await self._mirrors.remove(request.name)
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def copies(self) -> list[dict[str, str]]:
        """What containers see in each copy."""
        trees = [folder / "tree" for folder in self.folder.iterdir()] if self.folder.exists() else []
        return [
            {name: (tree / name).read_text() for name in os.listdir(tree) if name[:2] != ".."}
            for tree in trees
        ]

    async def until(self, *copies: dict[str, str]) -> None:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: self.copies() == list(copies))


class FakeGuest:
    """As much of `shim.guest.Guest` as is asked."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.knows = True

    async def extended(self) -> bool:
        return self.knows


class Site:
    """A sandbox's copies, the volume, and its guest."""

    def __init__(self, root: Path) -> None:
        self.volume = AtomicWriter(root / "volume")
        self.agent = Agent(root / "guest")
        self.guest: Any = FakeGuest(self.agent)
        self.tasks: list[asyncio.Task[None]] = []
        self.mirrors = Mirrors(self._in_background)

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    async def add(self, undo: ExitStack) -> str | None:
        return await self.mirrors.add(self.guest, self.volume.folder, "/the/source", undo)

    async def aclose(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.mirrors.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    before = sorted(os.listdir("/proc/self/fd"))
    site = Site(tmp_path)
    yield site
    await site.aclose()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~configmap/name", True),
        ("/elsewhere/pods/1-2/volumes/kubernetes.io~secret/name/", True),
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~projected/kube-api-access-x", True),
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~downward-api/name", True),
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir/name", False),
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~configmap/name/..data/key", False),
        ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~configmap", False),
        ("/var/lib/kubelet/pods/1-2/volume-subpaths/name/container/0", False),
        ("/data/kubernetes.io~configmap/name", False),
    ],
)
def test_which_volumes(source: str, wanted: bool) -> None:
    assert is_kubelets(source, ["rbind", "ro"]) is wanted
    assert not is_kubelets(source, ["rbind", "rw"])


async def test_every_change_reaches_the_guest(site: Site) -> None:
    site.volume.write({"a": "1", "b": "1"})
    with ExitStack() as undo:
        path = await site.add(undo)
        assert path is not None
        assert path.startswith("/run/kata-containers/sandbox/mirrors/")
        assert site.agent.copies() == [{"a": "1", "b": "1"}]
        for number in range(2, 5):
            files = {"a": str(number), f"c{number}": "new"}
            site.volume.write(files)
            await site.agent.until(files)


async def test_many_and_large_files(site: Site) -> None:
    files = {f"key{number}": "x" * 700 for number in range(1000)} | {"large": "y" * (2 << 20)}
    site.volume.write(files)
    with ExitStack() as undo:
        await site.add(undo)
        assert site.agent.copies() == [files]
        assert site.agent.calls > 8  # one after the other, none of them long


async def test_containers_share_a_copy_as_long_as_one_uses_it(site: Site) -> None:
    site.volume.write({"a": "1"})
    first, second = ExitStack(), ExitStack()
    paths = await asyncio.gather(site.add(first), site.add(second))
    assert paths[0] == paths[1]
    first.close()
    site.volume.write({"a": "2"})
    await site.agent.until({"a": "2"})
    second.close()
    await site.agent.until()
    again = await site.add(second)
    assert again not in (None, paths[0])
    second.close()
    await site.agent.until()


async def test_a_change_that_the_guest_did_not_take_is_sent_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_RETRY_S", 0.01)
    site.volume.write({"a": "1"})
    with ExitStack() as undo:
        await site.add(undo)
        site.agent.failures = [RpcError(Code.INTERNAL, "no space"), RpcError(Code.DEADLINE_EXCEEDED, "late")]
        with capture_logs() as lines:
            site.volume.write({"a": "2"})
            await site.agent.until({"a": "2"})
        assert [(line["event"], line["reason"]) for line in lines] == [
            ("volume_not_updated", "no space"),
            ("volume_not_updated", "late"),
        ]


async def shared_because(site: Site, reason: str) -> None:
    with ExitStack() as undo, capture_logs() as lines:
        assert await site.add(undo) is None
    (line,) = lines
    assert line["event"] == "volume_shared_without_notification"
    assert (line["source"], reason in line["reason"]) == ("/the/source", True), line
    assert site.agent.copies() == [] or site.agent.copies() == [{}]


async def test_what_is_too_large_is_shared(site: Site) -> None:
    site.volume.write({"large": "x" * (LIMIT_FILE_BYTES + 1)})
    await shared_because(site, "larger than 10000 files, 8 MiB in all or 3 MiB in one file")


async def test_what_no_kubelet_has_written_is_shared(site: Site) -> None:
    (site.volume.folder / "file").touch()
    await shared_because(site, "it has no link ..data")


async def test_without_room_in_the_guest_it_is_shared(site: Site) -> None:
    site.volume.write({"a": "1"})
    site.agent.failures = [RpcError(Code.INTERNAL, "No space left on device")]
    await shared_because(site, "No space left on device")


async def test_without_watches_of_the_host_it_is_shared(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.volume.write({"a": "1"})
    real = DirectoryWatch

    def when_the_host_has_no_more() -> DirectoryWatch:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            return real()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(mirror_module, "DirectoryWatch", when_the_host_has_no_more)
    await shared_because(site, "see fs.inotify.max_user_instances")


@pytest.mark.parametrize("older", [True, False])
async def test_agents_without_copies_are_not_complained_about(site: Site, older: bool) -> None:
    site.volume.write({"a": "1"})
    site.guest.knows = older
    site.agent.failures = [RpcError(Code.UNIMPLEMENTED, "unknown method UpdateMirror")]
    with ExitStack() as undo, capture_logs() as lines:
        assert await site.add(undo) is None
    assert lines == []


async def test_a_guest_that_is_gone_is_an_error(site: Site) -> None:
    site.volume.write({"a": "1"})
    site.agent.failures = [ConnectionClosed()]
    with ExitStack() as undo, pytest.raises(ConnectionClosed):
        await site.add(undo)


async def test_who_waits_when_the_sandbox_ends_is_told(site: Site) -> None:
    site.volume.write({"a": "1"})
    started, never = asyncio.Event(), asyncio.Event()

    async def hang(request: UpdateMirrorRequest) -> None:
        started.set()
        await never.wait()

    site.agent.update_mirror = hang  # type: ignore[method-assign]
    with ExitStack() as undo:
        waiting = asyncio.create_task(site.add(undo))
        await started.wait()
        await site.aclose()
        with pytest.raises(ConnectionClosed):
            await waiting


def test_one_version_is_read(tmp_path: Path) -> None:
    """What is being written, and what is being removed, is not what the link leads to."""
    volume = AtomicWriter(tmp_path / "volume")
    volume.write({"a": "1"})
    (volume.folder / "..2026_01_01").mkdir()
    (volume.folder / "..2026_01_01" / "old").touch()
    root = os.open(volume.folder, os.O_RDONLY)
    try:
        paths = [entry.path for piece in pieces(root) for entry in piece]
        assert paths == [b".", b"..2026_01_02_01", b"..2026_01_02_01/a", b"..data", b"a"]
        reading = pieces(root)
        volume.write({f"key{number}": "" for number in range(400)})
        first = pieces(root)
        next(first)
        volume.write({"b": "3"})
        with pytest.raises(Unsteady):
            list(first)
        assert [entry.path for piece in reading for entry in piece][-1] == b"b"
    finally:
        os.close(root)


def test_no_more_files_than_that(tmp_path: Path) -> None:
    volume = AtomicWriter(tmp_path / "volume")
    volume.write({f"{number}": "" for number in range(LIMIT_FILES // 2)})
    root = os.open(volume.folder, os.O_RDONLY)
    try:
        with pytest.raises(NotMirrored):
            list(pieces(root))
    finally:
        os.close(root)


@pytest.mark.parametrize("target", ["/etc", "elsewhere", "..1/below"])
def test_links_that_lead_elsewhere(tmp_path: Path, target: str) -> None:
    (tmp_path / "..data").symlink_to(target)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(NotMirrored, match="leads elsewhere"):
            list(pieces(root))
    finally:
        os.close(root)

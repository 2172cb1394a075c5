"""ConfigMaps, Secrets and their like: directories of a kubelet whose changes the guest is told of.

A change of the host shows in a shared directory, but nobody in the guest is notified: inotify there knows only of what
the guest does itself. So the guest gets a copy of such a directory instead, in its memory, and the copy is changed by
the guest's agent whenever the kubelet has changed the original. The host's kernel tells when: nothing is asked again
and again, and containers that use the same directory share one copy.

What cannot be copied, because it is large or because the guest's agent does not know how, is shared like any other
directory.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import structlog

from agent_proto.client import AgentGone
from agent_proto.gen.kata_py_agent_pb2 import RemoveMirrorRequest, UpdateMirrorRequest
from shim.aside import aside
from shim.directory_watch import DirectoryWatch
from shim.kubelet_files import NotMirrored, Unsteady, pieces
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from shim.background import InBackground
    from shim.guest import Guest
    from shim.share import SharedDir
    from shim.volumes import KubeletVolume

log = structlog.get_logger()

GUEST_DIR = "/run/kata-containers/sandbox/mirrors"
# A kubelet makes and removes links right after the change of versions: all of it is one change for the guest.
_SETTLE_S = 0.05
# A guest that did not take a change is asked again after this time, and after twice as long each time it fails.
_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
# How often a directory that changes while it is read for the first time is read again.
_FIRST_READS = 10


class _Mirror:
    """One copy. `users` are the containers that see it; `ready` is set when it is there for the first time, and
    `changed` when there is something to be done about it."""

    def __init__(self, folder: Path, source: str) -> None:
        self.name = os.urandom(8).hex()
        self.folder = folder
        self.source = source
        self.changed = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.users = 0


class Mirrors:
    """The copies in one guest. `in_background` runs something as long as the sandbox lives."""

    def __init__(self, in_background: InBackground) -> None:
        self._in_background = in_background
        self._watch: DirectoryWatch | None = None
        # By device and inode of the directory.
        self._mirrors: dict[tuple[int, int], _Mirror] = {}

    async def stand_in(
        self, volumes: Sequence[KubeletVolume], guest: Guest, share: SharedDir, undo: ExitStack
    ) -> None:
        """Let a container have copies of its volumes, of those that the guest can have a copy of. Raises as `add`."""
        for source, mount in volumes:
            if copy := await self.add(guest, share.on_host(mount.source), source, undo):
                mount.source = copy

    async def add(self, guest: Guest, folder: Path, source: str, undo: ExitStack) -> str | None:
        """The path of a copy of `folder` in the guest, for one container; None when there is to be none, which is
        logged. `source` is what the user knows it by. `undo` is told how to give it up.

        Raises:
            ConnectionClosed: the guest is gone.
        """
        try:
            if not await guest.extended():
                return None
            mirror = await self._added(guest, folder, source, undo)
        except ConnectionClosed:
            raise
        except (NotMirrored, OSError, RpcError) as err:
            if not (isinstance(err, RpcError) and err.code is Code.UNIMPLEMENTED):
                log.warning(
                    "volume_shared_without_notification",
                    source=source,
                    reason=str(err),
                    effect="changes show in the guest, but inotify there does not tell of them",
                )
            return None
        return f"{GUEST_DIR}/{mirror.name}/tree"

    def close(self) -> None:
        """Watch nothing any more. What runs in the background has ended."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    async def _added(self, guest: Guest, folder: Path, source: str, undo: ExitStack) -> _Mirror:
        info = os.stat(folder)
        key = info.st_dev, info.st_ino
        mirror = self._mirrors.get(key)
        if mirror is None:
            mirror = self._mirrors[key] = _Mirror(folder, source)
            self._in_background(self._keep(guest, mirror), f"mirror {source}")
        mirror.users += 1
        try:
            await asyncio.shield(mirror.ready)
        except BaseException:
            self._release(key, mirror)
            raise
        undo.callback(self._release, key, mirror)
        return mirror

    def _release(self, key: tuple[int, int], mirror: _Mirror) -> None:
        mirror.users -= 1
        if not mirror.users:
            del self._mirrors[key]
            mirror.changed.set()

    async def _keep(self, guest: Guest, mirror: _Mirror) -> None:
        """Make the copy, and keep it like the original until nobody uses it any more."""
        try:
            root = os.open(mirror.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if self._watch is None:
                    self._watch = DirectoryWatch()
                # Before it is read: what changes from now on is noticed.
                handle = self._watch.add(root, mirror.changed.set)
                try:
                    await _send_first(guest, mirror, root)
                    mirror.ready.set_result(None)
                    await _follow(guest, mirror, root)
                finally:
                    self._watch.remove(handle)
            finally:
                os.close(root)
        except (NotMirrored, OSError, RpcError) as err:
            _give_up(mirror, err)
        except asyncio.CancelledError:
            _give_up(mirror, AgentGone())
            raise


def _give_up(mirror: _Mirror, reason: Exception) -> None:
    if not mirror.ready.done():
        mirror.ready.set_exception(reason)
        mirror.ready.exception()  # it may be that nobody waits any more


async def _send_first(guest: Guest, mirror: _Mirror, root: int) -> None:
    for _ in range(_FIRST_READS):
        try:
            return await _send(guest, mirror, root)
        except Unsteady:
            await asyncio.sleep(_SETTLE_S)
    raise NotMirrored("it changes all the time")


async def _follow(guest: Guest, mirror: _Mirror, root: int) -> None:
    pause_s = _RETRY_S
    while True:
        await mirror.changed.wait()
        if not mirror.users:
            return await _remove(guest, mirror)
        await asyncio.sleep(_SETTLE_S)
        mirror.changed.clear()
        try:
            await _send(guest, mirror, root)
            pause_s = _RETRY_S
        except Unsteady:
            mirror.changed.set()
        except NotMirrored as err:
            log.error(
                "volume_not_updated",
                source=mirror.source,
                reason=str(err),
                remedy="the containers keep what they had: make it smaller, or restart the pod",
            )
        except ConnectionClosed:
            return None
        except (RpcError, OSError) as err:
            log.warning("volume_not_updated", source=mirror.source, reason=str(err), retry_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
            mirror.changed.set()
        if not mirror.users:
            mirror.changed.set()  # it may have been cleared


async def _send(guest: Guest, mirror: _Mirror, root: int) -> None:
    """Send the directory as it is now. Raises NotMirrored, Unsteady, OSError, RpcError."""
    request: UpdateMirrorRequest | None = None
    left = pieces(root)
    while (piece := await aside(partial(next, left, None))) is not None:
        if request is not None:
            await guest.agent.update_mirror(request)
        request = UpdateMirrorRequest(name=mirror.name, first=request is None, entries=piece)
    if request is not None:
        # Only now it is certain that all pieces are of one version.
        request.last = True
        await guest.agent.update_mirror(request)


async def _remove(guest: Guest, mirror: _Mirror) -> None:
    try:
        await guest.agent.remove_mirror(RemoveMirrorRequest(name=mirror.name))
    except RpcError as err:
        log.debug("mirror_not_removed", source=mirror.source, error=str(err))

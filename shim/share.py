"""The directory that a sandbox shares with its guest, and what is mounted into it.

`rw` is where the shim mounts root file systems and volumes; `ro` is a read-only view of `rw` that follows it and is
what virtiofsd exports, so that the guest cannot create anything beside what it was given. The layout below is
Kata's: the guest's agent finds things by these paths.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from shim import cleanup, mounts, paths
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from shim.api.gen.types_pb2 import Mount as ProtoMount

TAG = "kataShared"
GUEST_ROOT = "/run/kata-containers/shared/containers"
_BASENAME_BYTES = 64
GUEST_PASSTHROUGH = f"{GUEST_ROOT}/passthrough"


class SharedDir:
    """One sandbox's shared directory; `exported` is what virtiofsd serves."""

    def __init__(self, sandbox_id: str) -> None:
        self._base = Path(paths.shared_dir(sandbox_id))
        self._passthrough = self._base / "rw" / "passthrough"
        self.exported = self._base / "ro"

    def create(self) -> None:
        """Make the directories and join them by mount propagation.

        Raises:
            OSError: a directory or mount could not be made.
        """
        rw = self._base / "rw"
        paths.make_dir(str(self._base))
        self._passthrough.mkdir(parents=True, mode=0o755)
        self.exported.mkdir()
        mounts.bind(str(rw), str(rw))
        mounts.mount("", str(rw), "", mounts.MS_SHARED)
        mounts.bind(str(rw), str(self.exported))
        mounts.mount("", str(self.exported), "", mounts.MS_SLAVE)
        # A daemon in a mount namespace of its own sees later mounts only through a shared one.
        mounts.mount("", str(self.exported), "", mounts.MS_SHARED)
        mounts.mount("", str(self.exported), "", mounts.MS_BIND | mounts.MS_REMOUNT | mounts.MS_RDONLY)

    def remove(self) -> None:
        """Unmount everything and remove the directories. Harmless when repeated."""
        if self._base.exists():
            cleanup.unmount_below(str(self._base))
            cleanup.remove_tree(str(self._base))

    def add_rootfs(
        self, container_id: str, rootfs: Sequence[ProtoMount], directory: Path, undo: ExitStack
    ) -> str:
        """Mount a container's root file system where the guest finds it; returns the guest's path of it.

        `rootfs` is containerd's list of mounts; when it is empty, `directory` already is the root file system.

        Raises:
            OSError: the kernel refused a mount.
            InvalidRequest: there is no root file system at all.
        """
        target = self._passthrough / container_id / "rootfs"
        target.mkdir(parents=True)
        undo.callback(target.parent.rmdir)
        undo.callback(target.rmdir)
        for mount in rootfs:
            place = os.path.normpath(f"{target}/{mount.target}")
            if place != str(target) and not place.startswith(f"{target}/"):
                raise InvalidRequest(
                    f"rootfs mount of container {container_id} points outside: {mount.target}"
                )
            # One detaching per mount: they may lie on top of each other.
            undo.callback(mounts.detach, place)
            mounts.mount_with_options(mount.type, mount.source, place, list(mount.options))
        if not rootfs:
            if not directory.is_dir():
                raise InvalidRequest(
                    f"container {container_id} has no root file system: {directory} does not exist"
                )
            undo.callback(mounts.detach, str(target))
            mounts.bind(str(directory), str(target), recursive=True)
        return f"{GUEST_PASSTHROUGH}/{container_id}/rootfs"

    def add_volume(self, source: str, *, readonly: bool, undo: ExitStack) -> str:
        """Bind a host file or directory into the share; returns the guest's path of it.

        Raises:
            InvalidRequest: the source does not exist.
            OSError: the kernel refused the mount.
        """
        # A name may have 255 bytes; the end of a long one tells more, and the random part makes it unique.
        basename = os.fsencode(Path(source).name or "root")[-_BASENAME_BYTES:].decode(errors="replace")
        name = f"sandbox-{os.urandom(4).hex()}-{basename}"
        target = self._passthrough / name
        if os.path.isdir(source):
            target.mkdir()
            undo.callback(target.rmdir)
        elif os.path.exists(source):
            target.touch(exist_ok=False)
            undo.callback(target.unlink)
        else:
            raise InvalidRequest(f"cannot mount {source} into the container: it does not exist on the host")
        undo.callback(mounts.detach, str(target))
        mounts.bind(source, str(target), recursive=True, flags=mounts.MS_RDONLY if readonly else 0)
        return f"{GUEST_PASSTHROUGH}/{name}"

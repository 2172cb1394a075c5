"""The directory that a sandbox shares with its guest, and what is mounted into it.

`rw` is where the shim mounts root file systems and volumes; `ro` is a read-only view of `rw` that follows it and is
what virtiofsd exports, so that the guest cannot create anything beside what it was given. The layout below is
Kata's: the guest's agent finds things by these paths.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shim import cleanup, mounts, paths
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from contextlib import ExitStack

    from shim.api.gen.types_pb2 import Mount as ProtoMount
    from shim.layers import Layers

TAG = "kataShared"
GUEST_ROOT = "/run/kata-containers/shared/containers"
# The memory that the containers of a pod share, which the guest has from its start.
GUEST_SHM = "/run/kata-containers/sandbox/shm"
_BASENAME_BYTES = 64
_READ_ONLY = frozenset({"ro", "rro"})
_FOLLOWING = frozenset({"slave", "rslave", "shared", "rshared"})
GUEST_PASSTHROUGH = f"{GUEST_ROOT}/passthrough"
# Snapshotters describe images in options of mounts when Kata's agent is to mount these.
_GUESTS_OPTION = "io.katacontainers."
# Types of mounts that containerd 2.2 and later turn into others before a runtime gets them, for example those of its
# snapshotter erofs.
_MANAGED = ("format/", "mkfs/", "mkdir/")


class SharedDir:
    """One sandbox's shared directory; `exported` is what virtiofsd serves."""

    def __init__(self, sandbox_id: str) -> None:
        self._base = Path(paths.shared_dir(sandbox_id))
        self._passthrough = self._base / "rw" / "passthrough"
        self.exported = self._base / "ro"
        self.host_mounts: int | None = None

    def create(self, host_mounts: int | None = None) -> None:
        """Make the directories and join them by mount propagation. `host_mounts` is a descriptor of the mount namespace
        that sources are looked for in, None is this process's own.

        Raises:
            OSError: a directory or mount could not be made.
        """
        rw = self._base / "rw"
        self.host_mounts = host_mounts
        paths.make_dir(str(self._base))
        self._passthrough.mkdir(parents=True, mode=0o755)
        self.exported.mkdir()
        mounts.bind(str(rw), str(rw))
        mounts.mount("", str(rw), "", mounts.MS_SHARED)
        mounts.mount(str(rw), str(self.exported), "", mounts.MS_BIND)
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
        target = self._make_root(container_id, undo)
        for mount in rootfs:
            for option in mount.options:
                if option.startswith(_GUESTS_OPTION):
                    raise InvalidRequest(
                        f"the root file system of container {container_id} has the option {option.split('=')[0]}, "
                        "of an image that its guest is to mount: not supported in this version; use another snapshotter"
                    )
            if kind := next((word for word in _MANAGED if mount.type.startswith(word)), ""):
                raise InvalidRequest(
                    f"the root file system of container {container_id} has a mount of type {mount.type}, and {kind} is "
                    "containerd's to carry out: not supported in this version; let containerd activate such "
                    "mounts, or use the snapshotter overlayfs"
                )
            # Inside of what is mounted there already, whose symlinks must not lead anywhere else.
            place = mounts.path_in_root(str(target), mount.target or ".")
            # One detaching per mount: they may lie on top of each other. What lies below goes with them.
            undo.callback(mounts.detach, str(target))
            mounts.mount_with_options(
                mount.type, mount.source, place, list(mount.options), namespace=self.host_mounts
            )
        if not rootfs:
            if not directory.is_dir():
                raise InvalidRequest(
                    f"container {container_id} has no root file system: {directory} does not exist"
                )
            undo.callback(mounts.detach, str(target))
            mounts.bind(str(directory), str(target), recursive=True, namespace=self.host_mounts)
        return guest_rootfs(container_id)

    def add_layers(self, container_id: str, layers: Layers, undo: ExitStack) -> str:
        """Mount a root file system of layers where the guest finds it; returns the guest's path of it. Raises
        NotSupported, OSError."""
        from shim.layers import mount_on_host

        target = self._make_root(container_id, undo)
        folder = self._base / "layers" / container_id
        mount_on_host(layers, folder, str(target), self.host_mounts, undo)
        return guest_rootfs(container_id)

    def add_guests_rootfs(self, container_id: str, undo: ExitStack) -> str:
        """A place for a root file system that the guest mounts itself; returns its path there. Raises OSError."""
        self._make_root(container_id, undo)
        return guest_rootfs(container_id)

    def _make_root(self, container_id: str, undo: ExitStack) -> Path:
        target = self.rootfs(container_id)
        target.mkdir(parents=True)
        undo.callback(target.parent.rmdir)
        undo.callback(target.rmdir)
        return target

    def rootfs(self, container_id: str) -> Path:
        """Where `add_rootfs` has put it, on the host."""
        return self._passthrough / container_id / "rootfs"

    def add_volume(
        self, source: str, options: Collection[str], undo: ExitStack
    ) -> tuple[str, tuple[str, ...]]:
        """Bind a host file or directory into the share. Returns the guest's path of it, and options of the host's mount
        that a bind mount of it has as well, but the guest cannot know.

        Of the mount's `options`, those count here that the host has to see to: whether the guest may write, and
        whether mounts that the host makes later below a directory show up in it.

        Raises:
            InvalidRequest: the source does not exist.
            OSError: the kernel refused the mount.
        """
        try:
            tree = mounts.clone(
                source,
                recursive=True,
                flags=0 if _READ_ONLY.isdisjoint(options) else mounts.MS_RDONLY,
                follow=not _FOLLOWING.isdisjoint(options),
                namespace=self.host_mounts,
            )
        except (FileNotFoundError, NotADirectoryError) as err:
            raise InvalidRequest(
                f"cannot mount {source} into the container: it does not exist on the host"
            ) from err
        try:
            inherited = mounts.restrictions(tree)
            target = self._make_mount_point(Path(source).name, os.fstat(tree), undo)
            undo.callback(mounts.detach, str(target))
            mounts.attach(tree, str(target))
        finally:
            os.close(tree)
        return f"{GUEST_PASSTHROUGH}/{target.name}", inherited

    def on_host(self, guest_path: str) -> Path:
        """Where this process has what `add_volume` returned the guest's path of."""
        return self._passthrough / Path(guest_path).name

    def add_file_system(self, fstype: str, source: str, options: Sequence[str], undo: ExitStack) -> str:
        """Mount what is on a block device, or in an image, in the share; returns the guest's path of it.

        Raises:
            OSError: the kernel refused the mount.
        """
        target = self._make_mount_point(Path(source).name, os.stat(self._passthrough), undo)
        undo.callback(mounts.detach, str(target))
        mounts.mount_with_options(fstype, source, str(target), list(options), namespace=self.host_mounts)
        return f"{GUEST_PASSTHROUGH}/{target.name}"

    def add_sandbox_mounts(self, entries: Sequence[str]) -> None:
        """Bind host paths that every container's guest sees; each is `PATH:ro` or `PATH:rw`. They stay until `remove`.

        Raises:
            OSError: one is not there any more, or the kernel refused the mount.
        """
        folder = self._passthrough / "sandbox-mounts"
        folder.mkdir()
        for path, _, access in (entry.rpartition(":") for entry in entries):
            tree = mounts.clone(
                path,
                recursive=True,
                flags=mounts.MS_RDONLY if access == "ro" else 0,
                namespace=self.host_mounts,
            )
            try:
                target = folder / Path(path).name
                _make_like(os.fstat(tree), target)
                mounts.attach(tree, str(target))
            finally:
                os.close(tree)

    def _make_mount_point(self, name: str, source: os.stat_result, undo: ExitStack) -> Path:
        # A name may have 255 bytes; the end of a long one tells more, and the random part makes it unique.
        basename = os.fsencode(name or "root")[-_BASENAME_BYTES:].decode(errors="replace")
        target = self._passthrough / f"sandbox-{os.urandom(4).hex()}-{basename}"
        _make_like(source, target)
        undo.callback(target.rmdir if stat.S_ISDIR(source.st_mode) else target.unlink)
        return target


def guest_rootfs(container_id: str) -> str:
    """Where the guest finds a container's root file system."""
    return f"{GUEST_PASSTHROUGH}/{container_id}/rootfs"


def _make_like(source: os.stat_result, target: Path) -> None:
    """A directory to mount a directory on, or a file for anything else."""
    if stat.S_ISDIR(source.st_mode):
        target.mkdir()
    else:
        target.touch(exist_ok=False)

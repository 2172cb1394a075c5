"""What is known of a container between two calls: a folder for each, with `status.json` and a FIFO until the start.

A process id alone says little, since the kernel gives it to another process one day. Together with the time at which
the process began it is never mistaken.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from oci_engine import json_text
from oci_engine.errors import AlreadyExists, EngineError, NotFound
from oci_engine.records import Record
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"
FIFO = "exec.fifo"
_STATUS = "status.json"
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+.-")
_ID_LENGTH = 1024


class Status(Record):
    """`process_start_time` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    oci_version: str
    id: str
    pid: int
    root: str
    bundle: str
    rootfs: str
    process_start_time: int
    created: str
    owner: int
    cgroup_paths: dict[str, str]
    cgroups_path: str
    unit: str  # of systemd, empty without it
    no_pivot: bool
    no_new_keyring: bool
    spec: dict[str, object]

    def to_json(self) -> str:
        return json_text.dumps(
            {
                "ociVersion": self.oci_version,
                "id": self.id,
                "pid": self.pid,
                "root": self.root,
                "bundle": self.bundle,
                "rootfs": self.rootfs,
                "processStartTime": self.process_start_time,
                "created": self.created,
                "cgroupManager": {
                    "paths": self.cgroup_paths,
                    "mounts": {},
                    "cpath": self.cgroups_path,
                    "unit": self.unit,
                },
                "config": {
                    "cgroupName": self.cgroups_path or self.id,
                    "noPivotRoot": self.no_pivot,
                    "noNewKeyring": self.no_new_keyring,
                    "spec": self.spec,
                    "rootlessEuid": self.owner != 0,
                    "rootlessCgroup": False,
                    "containerName": self.id,
                    "owner": self.owner,
                },
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Status:
        """Raises ValueError, KeyError, TypeError when it is not whole."""
        data = json_text.loads(text)
        config, cgroup = data["config"], data["cgroupManager"]
        return cls(
            oci_version=data["ociVersion"],
            id=data["id"],
            pid=data["pid"],
            root=data["root"],
            bundle=data["bundle"],
            rootfs=data["rootfs"],
            process_start_time=data["processStartTime"],
            created=data["created"],
            owner=config["owner"],
            cgroup_paths=cgroup["paths"],
            cgroups_path=cgroup["cpath"],
            unit=cgroup.get("unit", ""),  # records of before it could be
            no_pivot=config["noPivotRoot"],
            no_new_keyring=config["noNewKeyring"],
            spec=config["spec"],
        )


class _Locked:
    """A block that has a container's folder to itself."""

    def __init__(self, folder: str, container_id: str) -> None:
        self._folder = folder
        self._id = container_id
        self._fd = -1

    def __enter__(self) -> None:
        try:
            fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"container {self._id} does not exist") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Deleted by the one who had the lock.
            if os.fstat(fd).st_nlink == 0:
                raise NotFound(f"container {self._id} does not exist")
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


class Store:
    """The folder of all containers, private to its owner."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def folder(self, container_id: str) -> str:
        """Raises EngineError for an id that cannot name one."""
        fits = 0 < len(container_id) <= _ID_LENGTH and _ID_CHARACTERS.issuperset(container_id)
        if not fits or container_id in (".", ".."):
            raise EngineError(f"invalid container id {container_id!r}: want letters, digits and _ + - .")
        return f"{self.root}/{container_id}"

    def fifo(self, container_id: str) -> str:
        return f"{self.folder(container_id)}/{FIFO}"

    def reserve(self, container_id: str) -> None:
        """Make the folder. Raises AlreadyExists."""
        folder = self.folder(container_id)
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            raise AlreadyExists(f"container {container_id} already exists") from None

    def locked(self, container_id: str) -> _Locked:
        """Verbs of one container come one after the other, also from different programs. Raises NotFound."""
        return _Locked(self.folder(container_id), container_id)

    def save(self, status: Status) -> None:
        """In one step: who reads meanwhile sees the old one or the new one."""
        path = f"{self.folder(status.id)}/{_STATUS}"
        fresh = f"{path}.new"
        with open(fresh, "w") as file:
            file.write(status.to_json())
        os.replace(fresh, path)

    def load(self, container_id: str) -> Status:
        """Raises NotFound, also for one that is only half made."""
        try:
            with open(f"{self.folder(container_id)}/{_STATUS}") as file:
                return Status.from_json(file.read())
        except FileNotFoundError:
            raise NotFound(f"container {container_id} does not exist") from None
        except (ValueError, KeyError, TypeError) as err:
            raise NotFound(f"container {container_id}: its {_STATUS} cannot be read: {err}") from None

    def remove(self, container_id: str) -> None:
        """Harmless if there is nothing."""
        folder = self.folder(container_id)
        with suppress(FileNotFoundError):
            # Its own files only: whatever else somebody put there is not the engine's to remove.
            for name in (FIFO, f"{FIFO}.new", f"{_STATUS}.new", _STATUS):
                with suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")
            os.rmdir(folder)

    def ids(self) -> list[str]:
        """Of all containers, whether or not they can be read."""
        try:
            entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def start_time(pid: int) -> int:
    """In clock ticks since boot; 0 when the process is gone, or has ended and waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZXx" else int(fields[19])


def opened_process(pid: int) -> int:
    """A descriptor of a process. Raises ProcessLookupError when there is none."""
    try:
        return os.pidfd_open(pid)
    except OSError as err:
        # Linux 6.12 and others say that of a process that is gone while its number is still that of a session.
        if err.errno == errno.EINVAL and pid > 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from err
        raise


def is_alive(status: Status) -> bool:
    """Whether the container's own process still runs."""
    return status.pid > 0 and start_time(status.pid) == status.process_start_time


def has_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False

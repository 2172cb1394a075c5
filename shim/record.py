"""What a sandbox's daemon leaves on disk so that a later process can find and undo everything it made.

The record is written before the first resource is created. A process is named by its pid and its start time
(field 22 of /proc/PID/stat, proc(5)), so that a reused pid is never mistaken for it.
"""

import json
import os

from shim import paths
from shim.procfs import stat_fields

_FILE = "record.json"


class Record:
    """The daemon of one sandbox and the programs it started, as (pid, start time in clock ticks) pairs; and the network
    namespace with the indices of the interfaces there whose packets go to the guest; and the folders of a control
    group."""

    def __init__(self, namespace: str, bundle: str, socket: str, pid: int, start_time: int) -> None:
        self.namespace = namespace
        self.bundle = bundle
        self.socket = socket
        self.pid = pid
        self.start_time = start_time
        self.helpers: dict[str, tuple[int, int]] = {}
        self.network: tuple[str, list[int]] = ("", [])
        self.cgroup: list[str] = []

    def daemon_alive(self) -> bool:
        """Whether the daemon that wrote the record still runs."""
        return is_alive(self.pid, self.start_time)

    def write(self, sandbox_id: str) -> None:
        """Write the record atomically into the sandbox's directory, which must exist."""
        path = f"{paths.run_dir(sandbox_id)}/{_FILE}"
        with open(f"{path}.tmp", "w") as file:
            json.dump(vars(self), file)
        os.rename(f"{path}.tmp", path)


def read(sandbox_id: str) -> Record | None:
    """The sandbox's record; None when there is none or it was cut short by a crash."""
    try:
        with open(f"{paths.run_dir(sandbox_id)}/{_FILE}") as file:
            data = json.load(file)
        record = Record(
            data["namespace"], data["bundle"], data["socket"], int(data["pid"]), int(data["start_time"])
        )
        netns, ifindexes = data["network"]
        # Shims that were started before this version have none, and go on through an upgrade.
        record.cgroup = [str(folder) for folder in data.get("cgroup", ())]
        record.network = str(netns), [int(ifindex) for ifindex in ifindexes]
        record.helpers = {name: (int(pid), int(start)) for name, (pid, start) in data["helpers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def start_time(pid: int) -> int | None:
    """The process's start time in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[3] in (b"Z", b"X") else int(fields[22])


def is_alive(pid: int, started: int) -> bool:
    """Whether `pid` is still the process that started at `started`."""
    return start_time(pid) == started

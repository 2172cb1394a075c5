"""How a container or one more process is to be made, beside what its specification says."""

from __future__ import annotations

from oci_engine.records import Record


class Streams(Record):
    """`stdio` are the open files that become 0, 1 and 2. `preserve_fds` is how many inheritable ones after 2 stay open.

    A terminal's master end is sent to `console_socket`, a path, or over `console`, an open socket.
    """

    stdio: tuple[int, int, int] = (0, 1, 2)
    preserve_fds: int = 0
    console_socket: str = ""
    console: int = -1


class CreateOptions(Record):
    """`rootless` makes it with what somebody else than the host's root may do, and without a control group."""

    streams: Streams = Streams()
    pid_file: str = ""
    no_pivot: bool = False
    no_new_keyring: bool = False
    systemd_cgroup: bool = False
    rootless: bool = False


class ExecOptions(Record):
    streams: Streams = Streams()
    pid_file: str = ""

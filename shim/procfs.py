"""What /proc tells of a process."""


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat, each at its number in proc(5), from the third one on.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The command name, in parentheses, may hold anything: what can be counted comes after its end.
        after_name = file.read().rpartition(b")")[2].split()
    return [b"", b"", b"", *after_name]

"""The kernel's list of mounts, /proc/PID/mountinfo."""

from __future__ import annotations

import os


def unescape(path: str) -> str:
    """Of a path in mountinfo, where white space and backslashes are octal."""
    if "\\" not in path:
        return path
    head, *rest = path.split("\\")
    return head + "".join(chr(int(each[:3], 8)) + each[3:] for each in rest)


def kind_of_device(device: int) -> str:
    """The type of the file system with this device number; empty when it is not mounted here."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/thread-self/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[2] == number:
                return fields[fields.index("-", 6) + 1]
    return ""

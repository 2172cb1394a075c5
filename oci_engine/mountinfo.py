"""The kernel's list of mounts, /proc/PID/mountinfo."""

from __future__ import annotations


def unescape(path: str) -> str:
    """Of a path in mountinfo, where white space and backslashes are octal."""
    if "\\" not in path:
        return path
    head, *rest = path.split("\\")
    return head + "".join(chr(int(each[:3], 8)) + each[3:] for each in rest)

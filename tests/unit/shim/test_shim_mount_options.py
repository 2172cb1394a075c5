"""fstab-style options to flags and data."""

from __future__ import annotations

import pytest

from shim import mounts
from shim.mounts import parse_options


@pytest.mark.parametrize(
    ("options", "flags", "propagation", "data"),
    [
        ([], 0, 0, ""),
        (["defaults"], 0, 0, ""),
        (["ro"], mounts.MS_RDONLY, 0, ""),
        (["ro", "rw"], 0, 0, ""),
        (["nosuid", "nodev", "noexec"], mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, 0, ""),
        (["nosuid", "suid", "nodev", "dev", "noexec", "exec"], 0, 0, ""),
        (["bind"], mounts.MS_BIND, 0, ""),
        (["rbind", "ro"], mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY, 0, ""),
        (["rslave"], 0, mounts.MS_SLAVE | mounts.MS_REC, ""),
        (["rbind", "rprivate"], mounts.MS_BIND | mounts.MS_REC, mounts.MS_PRIVATE | mounts.MS_REC, ""),
        (["size=64k", "mode=755"], 0, 0, "size=64k,mode=755"),
        (["lowerdir=/a:/b", "ro", "index=off"], mounts.MS_RDONLY, 0, "lowerdir=/a:/b,index=off"),
        (["loop", "ro"], mounts.MS_RDONLY, 0, ""),
        (["relatime", "norelatime", "noatime"], mounts.MS_NOATIME, 0, ""),
        (["strictatime", "sync", "dirsync", "mand"],
         mounts.MS_STRICTATIME | mounts.MS_SYNCHRONOUS | mounts.MS_DIRSYNC | mounts.MS_MANDLOCK, 0, ""),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_parse_options(options: list[str], flags: int, propagation: int, data: str) -> None:
    assert parse_options(options) == (flags, propagation, data)


def test_every_negation_undoes_its_option() -> None:
    for name, (flag, sets) in mounts.FLAGS.items():
        if not sets:
            positive = next(other for other, entry in mounts.FLAGS.items() if entry == (flag, True))
            assert parse_options([positive, name])[0] == 0, name

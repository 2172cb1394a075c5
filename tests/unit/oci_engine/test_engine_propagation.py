"""What the propagation of a container's mounts is until its root file system has been taken."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from oci_engine import linux
from oci_engine.plan import RootPlan
from oci_engine.rootfs import Rootfs

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE, SLAVE, BELOW = linux.MS_PRIVATE, linux.MS_SLAVE, linux.MS_REC


@pytest.mark.parametrize(
    ("propagation", "flags"),
    [
        ("", [SLAVE | BELOW]), ("rprivate", [PRIVATE | BELOW]), ("private", [SLAVE | BELOW, PRIVATE]),
        ("shared", [SLAVE | BELOW]), ("rshared", [SLAVE | BELOW]),
        ("unbindable", [SLAVE | BELOW, PRIVATE]), ("runbindable", [PRIVATE | BELOW]),
    ],
)  # fmt: skip
def test_nothing_that_is_to_be_bound_is_unbindable_or_the_hosts(
    propagation: str, flags: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_: list[int] = []
    monkeypatch.setattr(linux, "mount", lambda _source, _target, _kind, flags: set_.append(flags))
    monkeypatch.setattr(linux, "open_tree", lambda *_: os.open(tmp_path, os.O_PATH))
    monkeypatch.setattr(linux, "move_mount", lambda *_: None)
    rootfs = Rootfs(
        RootPlan(
            path=str(tmp_path), readonly=False, propagation=propagation, no_pivot=False, mounts=(), devices=(),
            bind_devices=False, masked_paths=(), readonly_paths=(), cgroup_mounts=(), mount_label="",
        )
    )  # fmt: skip
    rootfs.mount()
    os.close(rootfs.fd)
    assert set_ == flags

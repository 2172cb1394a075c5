"""Who maps the ids of a user namespace, and how, when it is not root."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from oci_engine import spawn
from oci_engine.linux_spec import IdMapping

if TYPE_CHECKING:
    import pytest


def test_a_user_whose_group_is_roots_maps_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 0)
    monkeypatch.setattr(spawn, "_write", lambda _pid, file, text, _place: written.append((file, text)))
    for kind, host in (("uid", 1000), ("gid", 0)):
        spawn._map_ids(1, kind, (IdMapping(container=0, host=host, size=1),), lambda _pid: 0)
    assert written == [("uid_map", "0 1000 1\n"), ("setgroups", "deny"), ("gid_map", "0 0 1\n")]

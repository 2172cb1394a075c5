"""Who maps the ids of a user namespace, and the process that goes into one to be asked for its."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from oci_engine import idmap, linux, spawn
from oci_engine.linux_spec import IdMapping
from oci_engine.waiting import wait_for_child

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


def test_the_process_that_goes_in_is_closed_to_who_lives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(linux, "prctl", lambda *words: os.write(writer, f"{words} ".encode()))
    monkeypatch.setattr(linux, "setns", lambda *_: os.write(writer, b"in"))
    idmap.mappings_of(-1, wait_for_child)
    os.close(writer)
    assert os.read(reader, 100).decode() == f"({linux.PR_SET_DUMPABLE}, 0) in"
    os.close(reader)

"""The record of a container on disk."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from oci_engine.errors import AlreadyExists, EngineError, NotFound
from oci_engine.state import Status, Store, is_alive, opened_process, start_time

if TYPE_CHECKING:
    from pathlib import Path

STATUS = Status(
    oci_version="1.0.2", id="c1", pid=os.getpid(), root="/run/runk", bundle="/b", rootfs="/b/rootfs",
    process_start_time=start_time(os.getpid()), created="2026-01-01T00:00:00.000000000Z", owner=0,
    cgroup_paths={"memory": "/m"}, cgroups_path="/c1", unit="", no_pivot=False, no_new_keyring=True, spec={"a": 1},
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_there_and_back(store: Store) -> None:
    store.reserve("c1")
    store.save(STATUS)
    assert store.load("c1") == STATUS
    assert store.ids() == ["c1"]
    assert os.stat(store.folder("c1")).st_mode & 0o777 == 0o700
    store.remove("c1")
    store.remove("c1")
    assert store.ids() == []


def test_names_of_the_fields() -> None:
    record = json.loads(STATUS.to_json())
    assert set(record) == {
        "ociVersion", "id", "pid", "root", "bundle", "rootfs", "processStartTime", "created", "cgroupManager", "config",
    }  # fmt: skip
    assert record["config"]["noNewKeyring"] is True
    assert record["cgroupManager"]["cpath"] == "/c1"


def test_ids_are_taken_once(store: Store) -> None:
    store.reserve("c1")
    with pytest.raises(AlreadyExists, match="container c1 already exists"):
        store.reserve("c1")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "ä", "a\n", "x" * 1025])
def test_ids_that_are_none(store: Store, name: str) -> None:
    with pytest.raises(EngineError, match="invalid container id"):
        store.reserve(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"config": 1}'])
def test_records_that_are_not_whole(store: Store, text: str) -> None:
    store.reserve("c1")
    with open(f"{store.folder('c1')}/status.json", "w") as file:
        file.write(text)
    with pytest.raises(NotFound):
        store.load("c1")


def test_locking_what_is_not_there(store: Store) -> None:
    with pytest.raises(NotFound), store.locked("c1"):
        pass


def test_whose_process_it_is() -> None:
    from oci_engine.records import replace

    assert is_alive(STATUS)
    assert not is_alive(replace(STATUS, process_start_time=STATUS.process_start_time + 1))
    assert not is_alive(replace(STATUS, pid=0, process_start_time=0))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_time(child) == 0  # a zombie
    os.waitpid(child, 0)
    assert start_time(child) == 0


def test_a_process_that_is_gone_while_its_session_is_not() -> None:
    """Its number is still in use, but not as a process's: kernels have two answers to who asks for that one."""
    reader, writer = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    os.waitpid(leader, 0)
    with pytest.raises(ProcessLookupError):
        opened_process(leader)
    os.close(writer)
    os.close(opened_process(os.getpid()))


def test_foreign_files_are_not_removed(store: Store) -> None:
    store.reserve("c1")
    path = f"{store.folder('c1')}/somebody"
    open(path, "w").close()
    with pytest.raises(OSError, match="not empty"):
        store.remove("c1")
    assert os.path.exists(path)

"""Filters that ask another program about system calls (SCMP_ACT_NOTIFY)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.errors import SetupFailed
from tests.support.containers import spec, wait
from tests.support.notified import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.containers import Containers, Spec


@pytest.fixture
def supervisor(containers: Containers, tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "listener.sock")
    yield made
    made.close()


def asking(path: str, *args: str, no_new_privileges: bool = True, flags: tuple[str, ...] = ()) -> Spec:
    document = spec(*args)
    document["annotations"] = {"a": "b"}
    document["process"]["noNewPrivileges"] = no_new_privileges
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": path,
        "listenerMetadata": "opaque",
        "flags": list(flags),
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    }
    return document


@pytest.mark.parametrize("no_new_privileges", [True, False])
@pytest.mark.parametrize(
    "flags", [(), ("SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV")]
)
def test_a_program_answers(
    containers: Containers, supervisor: Supervisor, no_new_privileges: bool, flags: tuple[str, ...]
) -> None:
    document = asking(
        supervisor.path, "sh", "-c", "mkdir /tmp/x; ls /proc/self/fd | wc -l",
        no_new_privileges=no_new_privileges, flags=flags,
    )  # fmt: skip
    container_id, pid, output = containers.create(document)
    # All is said before the start.
    (state,) = supervisor.states(1)
    assert supervisor.more == [b""]
    assert (state["pid"], state["metadata"], state["fds"]) == (pid, "opaque", ["seccompFd"])
    told: dict[str, Any] = state["state"]
    assert (told["id"], told["pid"], told["status"], told["annotations"]) == (
        container_id, pid, "creating", {"a": "b"},
    )  # fmt: skip
    containers.engine.start(container_id)
    assert wait(pid) == 0
    assert "Name not unique on network" in output.read_text()
    # The standard streams and the directory that is listed: its own listener a process never has.
    assert output.read_text().endswith("\n4\n")
    assert len(supervisor.asked) == 1
    containers.engine.delete(container_id)


def test_one_more_process_has_its_own_listener(containers: Containers, supervisor: Supervisor) -> None:
    container_id, pid = containers.running(asking(supervisor.path, "sleep", "1000"))
    status, output = containers.exec(container_id, "mkdir", "/tmp/x")
    assert (status, "Name not unique on network" in output) == (1, True)
    first, second = supervisor.states(2)
    assert (first["pid"], first["state"]["status"]) == (pid, "creating")
    assert second["pid"] != pid
    assert (second["state"]["pid"], second["state"]["status"]) == (pid, "running")
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_nobody_listens(containers: Containers, tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match=r"linux\.seccomp\.listenerPath: /.*: No such file"):
        containers.create(asking(str(tmp_path / "nobody"), "true"))
    assert containers.engine.ids() == []


def test_path_without_a_rule_that_asks(containers: Containers, supervisor: Supervisor) -> None:
    document = asking(supervisor.path, "true")
    document["linux"]["seccomp"]["syscalls"] = []
    assert containers.run(document) == (0, "")
    assert supervisor.states(0) == []
    assert os.path.exists(supervisor.path)

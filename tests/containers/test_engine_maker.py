"""What making a process changes of its maker: nothing. Only a thread that ends goes into the namespaces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from oci_engine.errors import EngineError
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from tests.support.containers import Containers, Spec


def belongings() -> dict[str, object]:
    """Of the calling thread."""
    own = Path("/proc/thread-self")
    umask = os.umask(0)
    os.umask(umask)
    return {
        "namespaces": {name: os.readlink(own / "ns" / name) for name in os.listdir(own / "ns")},
        "root": os.readlink(own / "root"),
        "directory": os.getcwd(),
        "umask": umask,
        "files": {number: os.readlink(f"/proc/self/fd/{number}") for number in open_files()},
        "control group": (own / "cgroup").read_text(),
    }


def open_files() -> list[str]:
    files = os.listdir("/proc/self/fd")
    return [number for number in files if os.path.lexists(f"/proc/self/fd/{number}")]


def test_caller_keeps_what_it_has(containers: Containers) -> None:
    before = belongings()
    container_id, pid = containers.running()
    assert belongings() == before
    assert containers.exec(container_id, "sh", "-c", "umask 077; cd /dev; exit 3")[0] == 3
    assert belongings() == before
    containers.engine.kill(container_id, 9)
    wait(pid)
    containers.engine.delete(container_id)
    assert belongings() == before


def test_namespaces_that_cannot_be_taken(containers: Containers) -> None:
    document = spec("true")
    namespaces = document["linux"]["namespaces"]
    # A file that is there, and of another kind.
    document["linux"]["namespaces"] = [
        {"type": "uts", "path": "/proc/self/ns/ipc"} if each["type"] == "uts" else each for each in namespaces
    ]
    before = belongings()
    with pytest.raises(EngineError, match=r"linux\.namespaces: setns"):
        containers.create(document)
    assert belongings() == before
    assert containers.leftovers() == []


def test_process_has_only_its_own_files_from_its_first_moment(containers: Containers) -> None:
    """A hook sees the process when it has done nothing but wait: whatever it has open then, it was born with."""
    seen = containers.folder / "seen"
    script = containers.folder / "hook"
    script.write_text(
        "#!/bin/sh\n"
        "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')\n"
        f"for fd in /proc/$pid/fd/*; do readlink $fd; done > {seen}\n"
    )
    script.chmod(0o755)
    secret = containers.folder / "secret"
    secret.write_text("")

    def edit(document: Spec) -> None:
        document["hooks"] = {"prestart": [{"path": str(script)}]}

    with secret.open() as inheritable:
        os.set_inheritable(inheritable.fileno(), True)
        assert containers.sh("exit 4", edit)[0] == 4
    files = seen.read_text().splitlines()
    assert files
    assert str(secret) not in files
    assert not [name for name in files if name.startswith("anon_inode")]

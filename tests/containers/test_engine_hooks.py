"""Hooks: their order, what they are told, how long they may take, and what becomes of the container if one fails."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.container import Engine
from oci_engine.errors import EngineError, HookFailed, SetupFailed
from oci_engine.options import CreateOptions
from oci_engine.spec import HOOKS
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.containers import Containers, Spec

EARLY = ("prestart", "createRuntime", "createContainer")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "hooks.log"
    path.touch()
    return path


def hook(log: Path, words: str, *, inside: bool = False, **more: Any) -> dict[str, Any]:
    place = "/log" if inside else str(log)
    return {
        "path": "/bin/sh",
        "args": ["sh", "-c", f"echo {words} >> {place}"],
        "env": ["PATH=/bin:/usr/bin"],
        **more,
    }


def too_long(**more: Any) -> dict[str, Any]:
    """One that never ends, and that gives birth to more."""
    return {"path": "/bin/sh", "args": ["sh", "-c", "sleep 1000 & wait"], "timeout": 1, **more}


def with_log(rootfs: Path, log: Path, *args: str) -> Spec:
    document = spec(*args)
    document["root"]["path"] = str(rootfs)
    (rootfs / "log").touch()
    document["mounts"].append(
        {"destination": "/log", "type": "bind", "source": str(log), "options": ["bind"]}
    )
    return document


def test_several_of_each_kind_in_their_order(containers: Containers, own_rootfs: Path, log: Path) -> None:
    document = with_log(own_rootfs, log, "true")
    document["hooks"] = {
        kind: [hook(log, f"{kind}{number}", inside=kind == "startContainer") for number in (1, 2)]
        for kind in reversed(HOOKS)
    }
    assert containers.run(document)[0] == 0
    assert log.read_text().split() == [f"{kind}{number}" for kind in HOOKS for number in (1, 2)]


@pytest.mark.parametrize("kind", EARLY)
def test_too_long_in_creation(containers: Containers, own_rootfs: Path, log: Path, kind: str) -> None:
    document = with_log(own_rootfs, log, "true")
    document["hooks"] = {
        kind: [hook(log, "first"), too_long(), hook(log, "never")], "poststop": [hook(log, "after")],
    }  # fmt: skip
    with pytest.raises((HookFailed, SetupFailed), match=rf"{kind} hook /bin/sh took longer than its 1 s"):
        containers.create(document)
    # The end of a container that could not be made is an end too.
    assert log.read_text().split() == ["first", "after"]
    assert containers.engine.ids() == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (too_long(), "took longer than its 1 s"),
        ({"path": "/bin/sh", "args": ["sh", "-c", "echo why; exit 9"]}, "ended with status 9: why"),
        ({"path": "/no/such"}, "No such file"),
    ],
    ids=["slow", "failing", "missing"],
)
def test_start_container_hook_that_fails(
    containers: Containers, own_rootfs: Path, log: Path, broken: dict[str, Any], words: str
) -> None:
    """It runs inside, after the one who created the container has gone; whoever starts it is told."""
    document = with_log(own_rootfs, log, "sh", "-c", "echo never > /log")
    document["hooks"] = {"startContainer": [broken], "poststop": [hook(log, "after")]}
    container_id, pid, _ = containers.create(document)
    with pytest.raises(HookFailed, match=f"startContainer hook .*{words}"):
        containers.engine.start(container_id)
    assert wait(pid) == 1
    assert containers.engine.state_of(containers.engine.load(container_id)) == "stopped"
    containers.engine.delete(container_id)
    assert log.read_text().split() == ["after"]


def test_poststart_hook_that_takes_too_long(containers: Containers) -> None:
    document = spec("sleep", "1000")
    document["hooks"] = {"poststart": [too_long()]}
    container_id, pid, _ = containers.create(document)
    with pytest.raises(HookFailed, match="poststart hook /bin/sh took longer"):
        containers.engine.start(container_id)
    assert wait(pid) == 137
    containers.engine.delete(container_id)


def test_poststop_hooks_that_fail_do_not_keep_the_others_from_running(
    containers: Containers, log: Path
) -> None:
    document = spec("true")
    document["hooks"] = {"poststop": [too_long(), {"path": "/bin/false"}, hook(log, "last")]}
    container_id, pid, _ = containers.create(document)
    containers.engine.start(container_id)
    wait(pid)
    complaints = containers.engine.delete(container_id)
    assert [each.partition(" hook ")[2].partition(" ")[2].split()[0] for each in complaints] == [
        "took", "ended",
    ]  # fmt: skip
    assert log.read_text().split() == ["last"]


@pytest.mark.parametrize("stage", ["created", "running"])
def test_poststop_after_a_crash(containers: Containers, log: Path, stage: str) -> None:
    """Of the container's process and of who made it: another one removes it, by its record alone."""
    document = spec("sleep", "1000")
    document["annotations"] = {"a": "b"}
    say = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >> {log}"], "env": ["PATH=/bin"]}
    document["hooks"] = {"poststop": [say]}
    container_id, bundle = containers.bundle(document)
    maker = os.fork()
    if maker == 0:
        try:
            engine = Engine(str(containers.folder / "state"))
            engine.create(container_id, str(bundle), CreateOptions())
            if stage == "running":
                engine.start(container_id)
        finally:
            os._exit(0)
    assert wait(maker) == 0
    pid = containers.engine.load(container_id).pid
    os.kill(pid, signal.SIGKILL)
    wait(pid)  # an orphan, adopted by this session
    containers.engine.delete(container_id)
    told = json.loads(log.read_text())
    assert (told["id"], told["status"], told["annotations"]) == (container_id, "stopped", {"a": "b"})
    assert "pid" not in told


def test_hooks_take_no_file_of_the_caller(containers: Containers, log: Path, tmp_path: Path) -> None:
    files = os.open(tmp_path, os.O_RDONLY)
    high = os.dup2(files, 77, inheritable=False)
    document = spec("true")
    document["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"ls /proc/self/fd >> {log}"], "env": ["PATH=/bin"]}]
        for kind in ("createRuntime", "createContainer", "poststop")
    }  # fmt: skip
    try:
        assert containers.run(document)[0] == 0
    finally:
        os.close(files)
        os.close(high)
    assert "77" not in log.read_text().split()
    assert log.read_text().split().count("2") == 3


def test_environment_of_a_hook_is_its_own(containers: Containers, log: Path) -> None:
    document = spec("true")
    document["hooks"] = {"createRuntime": [{"path": "/usr/bin/env", "args": ["env"], "env": ["ONLY=this"]}]}
    document["hooks"]["createRuntime"].append(
        {"path": "/bin/sh", "args": ["sh", "-c", f"env | grep -c OF_THE_CALLER >> {log}; true"]}
    )
    os.environ["OF_THE_CALLER"] = "1"
    try:
        containers.run(document)
    except EngineError as err:
        raise AssertionError from err
    finally:
        del os.environ["OF_THE_CALLER"]
    assert log.read_text().split() == ["0"]

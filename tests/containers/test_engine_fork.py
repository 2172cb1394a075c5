"""The fork from a caller in full swing: what its other threads hold, and what it has open, stays behind."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import io
import json
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.capabilities import SETS
from oci_engine.options import CreateOptions, Streams
from oci_engine.undo import Undo
from runk.foreground import ConsoleSocket
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.containers import Containers

CONTAINERS = 40


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Threads that hold locks of every kind at almost any time: of imports, logs, streams, malloc, files, our own."""
    stop = threading.Event()
    turns: dict[str, int] = {}
    own = threading.Lock()
    stream = io.TextIOWrapper(io.BufferedWriter(open(tmp_path / "stream", "wb", buffering=0)))  # noqa: SIM115
    logger = logging.getLogger("busy")
    logger.addHandler(logging.FileHandler(tmp_path / "log"))
    (tmp_path / "imported_while_forking.py").write_text(
        "import json\nx = [json.dumps(i) for i in range(200)]\n"
    )
    sys.path.insert(0, str(tmp_path))
    module = importlib.import_module("imported_while_forking")

    def files() -> None:
        fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(20)]
        os.set_inheritable(fds[7], True)
        for fd in fds:
            os.close(fd)

    def locked() -> None:
        with own:
            bytearray(1_000_000)

    works: dict[str, Callable[[], object]] = {
        "imports": lambda: importlib.reload(module),
        "logs": lambda: logger.error("%s", "x" * 100),
        "streams": lambda: stream.write("y" * 20_000),
        "files": files,
        "locks": locked,
        "json": lambda: json.loads(json.dumps({str(number): [number] * 9 for number in range(300)})),
    }

    def run(name: str) -> None:
        while not stop.is_set():
            works[name]()
            turns[name] = turns.get(name, 0) + 1

    threads = [threading.Thread(target=run, args=(name,)) for name in works]
    for thread in threads:
        thread.start()
    yield turns
    stop.set()
    for thread in threads:
        thread.join()
    stream.close()
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    sys.path.remove(str(tmp_path))
    del sys.modules["imported_while_forking"]


def test_locks_of_other_threads(containers: Containers, busy: dict[str, int]) -> None:
    """With a loop that runs, and two containers at a time. None hangs, and none has a file of the caller's."""

    async def main() -> list[tuple[int, str]]:
        done: list[tuple[int, str]] = []
        gate = asyncio.Semaphore(2)
        beats = 0

        async def one() -> None:
            async with gate:
                # The three streams, and the directory that is listed.
                done.append(await asyncio.to_thread(containers.sh, "ls /proc/self/fd | wc -l; exit 6"))

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        heart = asyncio.ensure_future(beat())
        await asyncio.gather(*(one() for _ in range(CONTAINERS)))
        heart.cancel()
        assert beats > 0
        return done

    assert asyncio.run(main()) == [(6, "4\n")] * CONTAINERS
    assert set(busy) == {"imports", "logs", "streams", "files", "locks", "json"}


def everything(containers: Containers, tmp_path: Path) -> dict[str, Any]:
    """A specification with all that the new process has to do in one way or another."""
    document = spec("true")
    document["process"] |= {
        "terminal": True, "consoleSize": {"height": 3, "width": 4}, "cwd": "/etc",
        "user": {"uid": 7, "gid": 8, "additionalGids": [9], "umask": 7},
        "capabilities": {name: ["CAP_KILL"] for name in SETS}, "oomScoreAdj": 5,
        "scheduler": {"policy": "SCHED_BATCH"}, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3},
    }  # fmt: skip
    document["domainname"] = "example"
    hook = {"path": "/bin/true"}
    document["hooks"] = {kind: [hook] for kind in ("createRuntime", "createContainer", "startContainer")}
    document["mounts"] += [
        {"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "ro"]},
        {"destination": "/home", "source": str(tmp_path), "options": ["rbind", "rro", "rslave"]},
        {"destination": "/home", "options": ["remount", "bind", "nodev"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", "size=1m"]},
    ]
    linux = document["linux"]
    linux["namespaces"] += [{"type": "cgroup"}, {"type": "time"}]
    linux |= {
        "sysctl": {"net.ipv4.ip_forward": "1"}, "timeOffsets": {"monotonic": {"secs": 5}},
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 5}, {"path": "/dev/p", "type": "p"}],
        "personality": {"domain": "LINUX"}, "rootfsPropagation": "rslave",
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}],
        },
    }  # fmt: skip
    return document


def test_nothing_is_imported_between_fork_and_exec(
    containers: Containers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have been importing the very same module, and nobody would ever finish that."""
    caller = os.getpid()
    whole = builtins.__import__

    def guarded(name: str, *args: Any, **more: Any) -> Any:
        if os.getpid() != caller and name not in sys.modules:
            raise AssertionError(f"{name} is imported in the new process")
        return whole(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    document = everything(containers, tmp_path)
    with Undo() as undo:
        console = ConsoleSocket(undo)
        container_id, bundle = containers.bundle(document)
        options = CreateOptions(streams=Streams(console_socket=console.path))
        pid = containers.engine.create(container_id, str(bundle), options)
        os.close(console.terminal())
        containers.engine.start(container_id)
        assert wait(pid) in (0, 129)  # whose terminal was hung up
        containers.engine.delete(container_id)
    # That it would be noticed.
    monkeypatch.setattr("oci_engine.identity.become", lambda process: __import__("this_is_not_loaded"))
    with pytest.raises(Exception, match="this_is_not_loaded is imported in the new process"):
        containers.create(spec("true"))


def test_nobody_hears_a_failed_process_twice(containers: Containers) -> None:
    """What waits in the caller's buffers at the fork is written once, by the caller."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        stream.write("once")
        for _ in range(3):
            with pytest.raises(Exception, match="executable file not found"):
                containers.create(spec("no-such"))
    with os.fdopen(reading) as answer:
        assert answer.read() == "once"

"""Every part of a sandbox dies in every state of its container: the task ends for all who wait, and after what a
user does next nothing is left. `host_state` compares the host after each test and shows what is."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import (
    SANDBOX_FOLDERS,
    SOCKET_FOLDER,
    mounts,
    sandbox_entries,
    wait_for_end,
)
from tests.integration.faults import PATIENCE_S, CreatedTask, Events, panic, parts, until, with_monitor

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.integration.containerd import Containerd, HostState

pytestmark = [pytest.mark.usefixtures("restored_configuration"), pytest.mark.one_version]

# The promises are two seconds for the end of a task and one for that of helpers without their shim; the rest is for
# a machine that is busy with other tests' guests.
EXIT_LIMIT_S = 15.0
# The grace that a signal has to be answered in, and some.
HUNG_LIMIT_S = 30.0
STATES = ("creating", "created", "running", "exec in flight", "stopping")
STOPS_WHEN_IT_LIKES = "trap 'echo held' TERM; echo up; while :; do sleep 1000 & wait; done"

in_all_states = pytest.mark.parametrize("state", STATES)


@contextmanager
def sandbox_in(containerd: Containerd, container: str, state: str) -> Iterator[Callable[[], bool]]:
    """A container in a state; gives a function that waits for its end and says whether that was a failure."""
    if state == "created":
        with closing(CreatedTask(containerd, container)) as task:
            yield task.ended_badly
        return
    command = ["sh", "-c", STOPS_WHEN_IT_LIKES]
    with ExitStack() as stack:

        def run(*arguments: str) -> subprocess.Popen[bytes]:
            client = stack.enter_context(containerd.popen(*arguments))
            stack.callback(client.kill)
            return client

        clients = [run(*containerd.run_arguments(container, command))]
        if state != "creating":
            expect(clients[0], b"up\n")
        if state == "exec in flight":
            words = [
                "--fifo-dir",
                str(containerd.server.folder / "fifo"),
                "--exec-id",
                containerd.new_id("e"),
            ]
            clients.append(run("tasks", "exec", *words, container, "sh", "-c", "echo up; exec sleep 1000"))
            expect(clients[1], b"up\n")
        elif state == "stopping":
            containerd.checked("tasks", "kill", "--signal", "SIGTERM", container)
            expect(clients[0], b"held\n")
        yield lambda: all(client.wait(EXIT_LIMIT_S) != 0 for client in clients)


def expect(client: subprocess.Popen[bytes], line: bytes) -> None:
    assert client.stdout is not None
    found = client.stdout.readline()
    assert found == line, client.communicate()


def running_parts(container: str) -> dict[str, int]:
    """All three parts, once they are there."""

    def look() -> dict[str, int]:
        found = parts(container)
        return found if len(found) == 3 else {}

    return until(look)


@in_all_states
@pytest.mark.parametrize("part", ["shim", "qemu", "virtiofsd", "agent"])
def test_a_part_dies(containerd: Containerd, tmp_path: Path, part: str, state: str) -> None:
    container = containerd.new_id()
    monitor = with_monitor(containerd.config, tmp_path) if part == "agent" else None
    with Events(containerd, container) as events:
        with sandbox_in(containerd, container, state) as ended_badly:
            pids = running_parts(container)
            if monitor is None:
                os.kill(pids[part], signal.SIGKILL)
            else:
                # With the guest up, the agent is at work on CreateContainer.
                until(Path(SANDBOX_FOLDERS[0], container, "timings.json").exists)
                panic(monitor)
            died_at = time.monotonic()
            assert ended_badly()
            assert time.monotonic() - died_at < EXIT_LIMIT_S
            wait_for_end([pid for name, pid in pids.items() if name != "shim"], EXIT_LIMIT_S)
            assert parts(container) == {}
        containerd.remove(container)
        told = events.to_the_end()
    ends = [status for topic, status in told if topic == "/tasks/exit"]
    assert 0 not in ends
    if part != "shim":  # else containerd tells it, unless the client that waits deletes the task before
        assert len(ends) == {"creating": 0, "exec in flight": 2}.get(state, 1)


def test_what_a_killed_shim_leaves(containerd: Containerd, host_state: HostState) -> None:
    """Nobody cleans up while containerd stands still: what is there then is all that `delete` has to find."""
    container = containerd.start("sleep", "1000")
    pids = running_parts(container)
    server = containerd.server.pid()
    assert server is not None
    os.kill(server, signal.SIGSTOP)
    try:
        os.kill(pids["shim"], signal.SIGKILL)
        wait_for_end(list(pids.values()), EXIT_LIMIT_S)
        assert parts(container) == {}
        folders = {f"{folder}/{container}" for folder in SANDBOX_FOLDERS}
        (shims_socket,) = sandbox_entries(containerd) - folders
        assert folders < sandbox_entries(containerd)
        assert shims_socket.startswith(SOCKET_FOLDER)
        left = os.listdir(Path(SANDBOX_FOLDERS[0], container))
        files = ["config.json", "console.log", "qmp.sock", "record.json", "shim-monitor.sock", "timings.json"]
        assert sorted(left) == files
        # Those of the root file system and of the shared directory were the shim's alone.
        assert mounts(containerd) == host_state.mounts
    finally:
        os.kill(server, signal.SIGCONT)
    containerd.remove(container)


@pytest.mark.parametrize("verb", ["kill", "rm"])
def test_guest_that_hangs(containerd: Containerd, verb: str) -> None:
    """Nothing in the guest answers any more: it is killed with its machine."""
    container = containerd.start("sleep", "1000")
    os.kill(running_parts(container)["qemu"], signal.SIGSTOP)
    words = ["--signal", "SIGKILL"] if verb == "kill" else ["--force"]
    started_at = time.monotonic()
    done = containerd.ctr("tasks", verb, *words, container, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    if verb == "kill":
        containerd.checked("tasks", "rm", container)
    assert time.monotonic() - started_at < HUNG_LIMIT_S
    containerd.checked("containers", "rm", container)

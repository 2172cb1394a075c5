"""containerd dies and comes back while containers run: nothing that happened meanwhile is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import wait_for_end
from tests.support.bundles import shell
from tests.support.fake_containerd import Shim
from tests.support.host import descendants
from ttrpc import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.integration.containerd import Containerd

BUNDLES = "io.containerd.runtime.v2.task"
SHIM_END_LIMIT_S = 20.0


def kill_containerd(containerd: Containerd) -> None:
    pid = containerd.server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def status(containerd: Containerd, container: str) -> str:
    lines = [line.split() for line in containerd.checked("tasks", "ls").splitlines()]
    return next((words[2] for words in lines if words[0] == container), "absent")


@asynccontextmanager
async def reached(containerd: Containerd, container: str) -> AsyncIterator[Shim]:
    """The container's shim, called directly: containerd is away."""
    bundle = containerd.server.folder / "state" / BUNDLES / containerd.namespace / container
    address = (bundle / "address").read_text()
    client = await Client.connect_unix(address.removeprefix("unix://"))
    try:
        yield Shim(container, bundle, address, client, version=2)
    finally:
        await client.aclose()


@pytest.fixture
def talkative(containerd: Containerd) -> Iterator[Containerd]:
    """The same containerd, which tells from its next start on which events it has got; until the test's end."""
    yield replace(containerd, server=replace(containerd.server, log_level="trace"))
    kill_containerd(containerd)
    containerd.server.start()


def test_container_survives_several_restarts(containerd: Containerd) -> None:
    container = containerd.start("sh", "-c", "mkfifo /f; while :; do read line < /f && echo $line; done")
    for number in range(3):
        kill_containerd(containerd)
        containerd.server.start()
        assert status(containerd, container) == "RUNNING"
        done = containerd.exec(container, "sh", "-c", f"cat; echo {number} > /f; exit {number}", input="in\n")
        assert (done.returncode, done.stdout) == (number, "in\n")
    reader = containerd.popen("tasks", "attach", container)
    containerd.checked("tasks", "kill", "--signal", "SIGKILL", container)
    out, _ = reader.communicate(timeout=60)
    assert (reader.returncode, out) == (128 + signal.SIGKILL, b"0\n1\n2\n")
    containerd.checked("containers", "rm", container)


async def test_output_of_the_absence_is_all_there(containerd: Containerd) -> None:
    script = "mkfifo /f; read line < /f; seq 1 200000; exit 9"
    container = containerd.start("sh", "-c", script)
    kill_containerd(containerd)
    async with reached(containerd, container) as shim:
        await shim.exec("go", shell("echo > /f"))
        await shim.call("Start", exec_id="go")
        assert (await shim.call("Wait", exec_id="go")).exit_status == 0
        await shim.call("Delete", exec_id="go")
    containerd.server.start()
    assert status(containerd, container) == "RUNNING", "nobody reads, and a pipe holds less"
    reader = containerd.popen("tasks", "attach", container)
    out, _ = await asyncio.to_thread(reader.communicate, timeout=120)
    assert reader.returncode == 9
    assert out == b"".join(b"%d\n" % number for number in range(1, 200001))
    containerd.checked("containers", "rm", container)


async def test_end_during_the_absence_is_known(talkative: Containerd) -> None:
    container = talkative.start("sh", "-c", "mkfifo /f; read line < /f; echo last words; exit 9")
    shim_pid = next(
        pid for pid, name in descendants(os.getpid()).items() if "shim-kata-py" in name and container in name
    )
    kill_containerd(talkative)
    async with reached(talkative, container) as shim:
        await shim.exec("go", shell("echo > /f"))
        await shim.call("Start", exec_id="go")
        assert (await shim.call("Wait")).exit_status == 9
    offset = talkative.server.log_size()
    talkative.server.start()
    assert status(talkative, container) == "STOPPED"
    assert "exit code 9" in talkative.ctr("tasks", "rm", container).stderr
    talkative.checked("containers", "rm", container)
    # Its last events are out when a shim ends.
    wait_for_end([shim_pid], SHIM_END_LIMIT_S)
    told = [line for line in talkative.server.log_since(offset).splitlines() if "event forwarded" in line]
    topics = [word.removeprefix("topic=") for line in told for word in line.split() if "topic=" in word]
    assert topics[:4] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exit"]
    assert set(topics[4:]) == {"/tasks/delete"}

"""kata-py's files vanish under a running daemon: it goes on with everything, and imports nothing any more."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as ProtoAny
from launcher import SHIM_SOURCE

from shim.api.gen import events_pb2
from tests.support.bundles import make_fifos, read_all, shell, spec
from tests.support.installation import Installation
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

# The standard library is the distribution's, which has its own ways of upgrading it.
NOTE_IMPORTS = """\
import sys
import os
note = os.open({place!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
sys.addaudithook(lambda event, what: event == "import" and os.write(note, what[0].encode() + b"\\n"))
"""


class Audited:
    """An installation that notes what is imported from it."""

    def __init__(self, folder: Path, program: Path) -> None:
        self._notes = folder / "imports"
        self._seen = 0
        note = NOTE_IMPORTS.replace("{place!r}", repr(str(self._notes)))
        source = SHIM_SOURCE.replace("import sys\n", note, 1)
        self._installation = Installation(folder / "installed", program, source=source)

    def remove(self) -> None:
        self._installation.remove()
        self._seen = self._notes.stat().st_size

    def imported_since(self) -> list[str]:
        """What somebody wanted to import after the removal, without the standard library's modules."""
        names = self._notes.read_text()[self._seen :].split()
        return [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]


@pytest.fixture
def installation(containerd: FakeContainerd, tmp_path: Path) -> Audited:
    return Audited(tmp_path, containerd.program)


@pytest.fixture
async def shim(installation: Audited, containerd: FakeContainerd, name: str) -> Shim:
    """A running container whose kata-py has been removed."""
    bundle = containerd.bundle(name, spec(shell("echo up; exec sleep 100")))
    shim = await containerd.start(name, bundle)
    await shim.create(**make_fifos(bundle / "io", "stdout")._asdict())
    await shim.call("Start")
    installation.remove()
    return shim


async def refusal(shim: Shim, verb: str, **fields: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await shim.call(verb, **fields)
    return caught.value


async def test_everything_works_without_the_files(
    containerd: FakeContainerd, agent: FakeAgent, installation: Audited, shim: Shim
) -> None:
    agent.stats.cgroup_stats.memory_stats.usage.usage = 4096
    stdio = make_fifos(shim.bundle / "exec", "stdin", "stdout", "stderr")
    await shim.exec("e", shell("cat; echo problem >&2; exit 5"), **stdio._asdict())
    await shim.call("Start", exec_id="e")
    await shim.call("ResizePty", exec_id="e", width=80, height=24)
    assert (await shim.call("Pids")).processes
    Path(stdio.stdin).write_bytes(b"through\n")
    await shim.call("CloseIO", exec_id="e", stdin=True)
    assert (await shim.call("Wait", exec_id="e")).exit_status == 5
    assert (await read_all(stdio.stdout), await read_all(stdio.stderr)) == (b"through\n", b"problem\n")
    await shim.call("Delete", exec_id="e")
    await shim.call("Pause")
    await shim.call("Resume")
    resources = {"memory": {"limit": 1 << 27}, "cpu": {"shares": 512}}
    await shim.call("Update", resources=ProtoAny(type_url="any", value=json.dumps(resources).encode()))
    assert (await shim.call("Stats")).stats.value
    agent.out_of_memory(shim.id)
    await containerd.event(events_pb2.TaskOOM)
    await shim.call("Kill", signal=int(signal.SIGTERM))
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGTERM
    assert (await shim.call("State")).exit_status == 128 + signal.SIGTERM
    assert await read_all(str(shim.bundle / "io" / "stdout")) == b"up\n"
    await shim.call("Delete")
    await shim.shutdown()
    assert installation.imported_since() == []


async def test_refusals_without_the_files(agent: FakeAgent, installation: Audited, shim: Shim) -> None:
    agent.fail("ExecProcess", Code.INTERNAL, "no such program")
    await shim.exec("e", shell("true"))
    assert "no such program" in (await refusal(shim, "Start", exec_id="e")).message
    assert (await refusal(shim, "State", id="other")).code == Code.NOT_FOUND
    assert (await refusal(shim, "Wait", exec_id="other")).code == Code.NOT_FOUND
    assert (await refusal(shim, "Resume")).code == Code.FAILED_PRECONDITION
    assert (await refusal(shim, "Checkpoint")).code == Code.UNIMPLEMENTED
    nonsense = ProtoAny(type_url="any", value=b"{]")
    assert (await refusal(shim, "Update", resources=nonsense)).code == Code.INVALID_ARGUMENT
    assert (await refusal(shim, "Delete")).code == Code.FAILED_PRECONDITION
    await shim.shutdown(now=True)
    assert installation.imported_since() == []


async def test_death_of_the_guest_without_the_files(
    agent: FakeAgent, installation: Audited, shim: Shim
) -> None:
    await agent.die()
    await shim.call("Wait")
    with suppress(RpcError, ConnectionClosed):
        await shim.call("Delete")
    await shim.shutdown(now=True)
    assert installation.imported_since() == []


async def test_signal_that_ends_the_daemon_without_the_files(
    containerd: FakeContainerd, installation: Audited, shim: Shim
) -> None:
    os.kill(shim.pid, signal.SIGTERM)
    await containerd.event(events_pb2.TaskExit)
    await shim.client.wait_closed()
    assert installation.imported_since() == []

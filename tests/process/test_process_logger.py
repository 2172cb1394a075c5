"""Loggers through the real program: `binary://` for a container and an exec, and what remains of them."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests.process.test_process_stdio import MIB
from tests.support import host
from tests.support.bundles import shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_containerd import FakeContainerd

LOGGER = """\
#!{python} -ISu
import json, os, sys, threading
folder = sys.argv[sys.argv.index("--folder") + 1]
def keep(fd, name):
    with open(os.path.join(folder, os.environ["CONTAINER_ID"] + name), "wb") as file:
        while data := os.read(fd, 65536):
            file.write(data)
with open(os.path.join(folder, os.environ["CONTAINER_ID"]), "w") as file:
    json.dump({{"argv": sys.argv[1:], "namespace": os.environ["CONTAINER_NAMESPACE"]}}, file)
os.write(5, b"1")
os.close(5)
out = threading.Thread(target=keep, args=(3, ".out"))
out.start()
keep(4, ".err")
out.join()
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A logger that keeps everything below the test's folder."""
    path = tmp_path / "logger"
    path.write_text(LOGGER.format(python=sys.executable))
    path.chmod(0o755)
    return f"binary-v2://{path}?--folder={tmp_path}"


async def test_container_and_exec(containerd: FakeContainerd, name: str, tmp_path: Path, uri: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(MIB)
    bundle = containerd.bundle(name, spec(shell(f"cat {data}; echo err >&2; exec sleep 100")))
    shim = await containerd.start(name, bundle)
    await shim.create(stdout=uri, stderr=uri)
    await shim.call("Start")
    before = host.open_files(shim.pid)
    await shim.exec("e", shell(f"cat {data} >&2; exit 3"), stdout=uri, stderr=uri)
    await shim.call("Start", exec_id="e")
    assert (await shim.call("Wait", exec_id="e")).exit_status == 3
    await shim.call("Delete", exec_id="e")
    assert (tmp_path / "e.err").read_bytes() == MIB
    assert host.open_files(shim.pid) == before
    assert (await shim.call("State")).stdout == uri
    await shim.call("Kill", signal=9)
    await shim.call("Wait")
    await shim.call("Delete")
    assert (tmp_path / f"{name}.out").read_bytes() == MIB
    assert (tmp_path / f"{name}.err").read_bytes() == b"err\n"
    told = json.loads((tmp_path / name).read_text())
    assert told == {"argv": ["--folder", str(tmp_path)], "namespace": "fake"}
    await shim.shutdown()


async def test_refused(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    path = tmp_path / "logger"
    path.write_text(f"#!{sys.executable} -IS\nraise SystemExit('no disk')\n")
    path.chmod(0o755)
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create()
    app = containerd.bundle(f"{name}-app", spec(shell("exec sleep 100")))
    before = host.open_files(shim.pid)
    ended = "ended before it was ready: exit status 1: no disk"
    refusals = {
        "/no/such": f"cannot run the logger /no/such of container {app.name}: No such file or directory",
        str(path): f"the logger {path} of container {app.name} {ended}",
    }
    for program, text in refusals.items():
        with pytest.raises(RpcError) as refused:
            await shim.create(app.name, bundle=app, stdout=f"binary://{program}")
        assert (refused.value.code, refused.value.message) == (Code.INVALID_ARGUMENT, text)
    assert host.open_files(shim.pid) == before


async def test_another_exec_does_not_wait_for_a_logger(
    containerd: FakeContainerd, name: str, tmp_path: Path
) -> None:
    """One that never becomes ready holds up nobody but who asked for it."""
    path = tmp_path / "logger"
    path.write_text(f"#!{sys.executable} -IS\nimport signal\nsignal.pause()\n")
    path.chmod(0o755)
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create()
    await shim.call("Start")
    slow = asyncio.create_task(shim.exec("slow", shell("exit 0"), stdout=f"binary://{path}"))
    async with asyncio.timeout(5):  # half of what the logger is given
        await shim.exec("quick", shell("exit 4"))
        await shim.call("Start", exec_id="quick")
        assert (await shim.call("Wait", exec_id="quick")).exit_status == 4
        await shim.call("State")
    assert not slow.done()
    with pytest.raises(RpcError, match="is not ready after 10 s") as refused:
        await slow
    assert refused.value.code is Code.INVALID_ARGUMENT

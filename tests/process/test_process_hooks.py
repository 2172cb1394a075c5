"""The hooks of a container that run on the host: in which order, with what, and what their failure does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bundles import shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd

KINDS = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
# What a hook was called as, where it ran, and what it read.
SAY = (
    'printf \'{"name": "%s", "net": "%s", "mnt": "%s", "word": "%s", "state": %s}\\n\''
    ' "$(tr "\\0" " " < /proc/$$/cmdline | cut -d" " -f1)" "$(readlink /proc/self/ns/net)"'
    ' "$(readlink /proc/self/ns/mnt)" "$WORD" "$(cat)" >> '
)


def hook(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


def bundle(containerd: FakeContainerd, name: str, **hooks: Any) -> Path:
    return containerd.bundle(name, spec(shell("exec sleep 100"), hooks=hooks, annotations={"a": "b"}))


async def test_all_of_them(containerd: FakeContainerd, agent: FakeAgent, name: str) -> None:
    said = containerd.folder / "said"
    hooks = {
        kind: [{"path": "/bin/sh", "args": [f"as-{kind}", "-c", f"{SAY}{said}"], "env": [f"WORD={kind}=1"]}]
        for kind in KINDS
    }
    shim = await containerd.start(name, bundle(containerd, name, **hooks))

    def entries() -> list[dict[str, Any]]:
        return [json.loads(line) for line in said.read_text().splitlines()]

    pid = (await shim.create()).pid
    assert [entry["name"] for entry in entries()] == [f"as-{kind}" for kind in KINDS[:3]]
    here = os.readlink("/proc/self/ns/net")
    machines = os.readlink(f"/proc/{pid}/ns/net")
    assert machines != here
    assert [entry["net"] for entry in entries()] == [here, here, machines]
    await shim.call("Start")
    assert [entry["name"] for entry in entries()][3:] == ["as-poststart"]
    await shim.call("Kill", signal=int(signal.SIGKILL))
    await shim.call("Wait")
    await shim.call("Delete")
    found = entries()
    assert [entry["word"] for entry in found] == [f"{kind}=1" for kind in KINDS]
    assert {entry["mnt"] for entry in found} == {os.readlink("/proc/self/ns/mnt")}
    states = [entry["state"] for entry in found]
    assert [state["status"] for state in states] == ["creating"] * 3 + ["running", "stopped"]
    assert [state["pid"] for state in states] == [pid] * 4 + [0]
    for state in states:
        assert (state["id"], state["bundle"], state["ociVersion"]) == (name, str(shim.bundle), "1.1.0")
        assert state["annotations"] == {"a": "b"}
    request = await agent.request("CreateContainer")
    assert not request.OCI.HasField("Hooks")


@pytest.mark.parametrize("kind", KINDS[:3])
async def test_one_that_fails_keeps_the_container_from_being_made(
    containerd: FakeContainerd, agent: FakeAgent, name: str, kind: str
) -> None:
    after = containerd.folder / "after"
    hooks = {
        kind: [hook("echo one; echo the reason >&2; exit 3"), hook(f"touch {after}.wrong")],
        "poststop": [hook(f"touch {after}")],
    }
    shim = await containerd.start(name, bundle(containerd, name, **hooks))
    with pytest.raises(RpcError) as caught:
        await shim.create()
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.message == (
        f"{kind} hook /bin/sh of container {name} failed: exit status 3: one | the reason"
    )
    assert "CreateContainer" not in [request.method for request in agent.requests.items]
    assert [path.name for path in containerd.folder.glob("after*")] == ["after"]
    await shim.shutdown()


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        (hook("sleep 1000", timeout=1), Code.FAILED_PRECONDITION, "has not ended after 1 s; it was killed"),
        ({"path": "/no/such"}, Code.FAILED_PRECONDITION, "cannot start /no/such: No such file"),
        ({"path": "relative"}, Code.INVALID_ARGUMENT, "hook 'relative': want an absolute path"),
        ({"path": 7}, Code.INVALID_ARGUMENT, "is not an OCI runtime spec"),
    ],
)
async def test_hooks_that_do_not_work(
    containerd: FakeContainerd, name: str, changed: dict[str, Any], code: Code, words: str
) -> None:
    shim = await containerd.start(name, bundle(containerd, name, createRuntime=[changed]))
    with pytest.raises(RpcError, match=words) as caught:
        await shim.create()
    assert caught.value.code is code
    await shim.shutdown()


async def test_what_comes_after_the_container_may_fail(containerd: FakeContainerd, name: str) -> None:
    after = containerd.folder / "after"
    failing = [hook("exit 1"), hook(f"touch {after}")]
    shim = await containerd.start(name, bundle(containerd, name, poststart=failing, poststop=failing))
    await shim.create()
    await shim.call("Start")
    assert after.exists()
    after.unlink()
    await shim.call("Kill", signal=int(signal.SIGKILL))
    await shim.call("Wait")
    await shim.call("Delete")
    assert after.exists()


async def test_what_comes_between_create_and_start_is_seen(containerd: FakeContainerd, name: str) -> None:
    """As Docker brings networks: here one that no guest can have, and then none."""
    shim = await containerd.start(name, bundle(containerd, name))
    pid = (await shim.create()).pid

    def ip(words: str) -> None:
        subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words.split()], check=True)

    ip("tuntap add tun0 mode tun")
    ip("link set tun0 up")
    with pytest.raises(RpcError, match=r"interface tun0 of the pod .* has no MAC address") as caught:
        await shim.call("Start")
    assert caught.value.code is Code.FAILED_PRECONDITION

"""A hundred creates that cannot succeed, for ten reasons: whatever is wrong, nothing piles up anywhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from shim.api.gen.types_pb2 import Mount
from tests.support import host
from tests.support.bundles import pod, shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd

TIMES = 10


class Fault(NamedTuple):
    """One thing that is wrong, and what the user reads; `code` is None where already `start` refuses."""

    code: Code | None
    words: str
    config: Callable[[dict[str, Any]], object] = lambda config: None
    request: dict[str, Any] = {}  # noqa: RUF012 - never changed
    setting: tuple[str, str] = ("", "")
    text: str = ""
    refused_by_guest: bool = False


def _mount(config: dict[str, Any]) -> None:
    config["mounts"].append(
        {"destination": "/d", "type": "bind", "source": "/no/source", "options": ["bind"]}
    )


FAULTS = {
    "configuration": Fault(
        Code.INVALID_ARGUMENT, "default_vcpus", setting=("accel", 'default_vcpus = "two"\naccel')
    ),
    "kernel": Fault(Code.INVALID_ARGUMENT, "/no/kernel", setting=("kernel", 'kernel = "/no/kernel"\n#')),
    "QEMU": Fault(Code.INVALID_ARGUMENT, "/no/qemu", setting=("path", 'path = "/no/qemu"\n#')),
    "root file system": Fault(
        Code.INTERNAL, "cannot mount nosuchfs", request={"rootfs": [Mount(type="nosuchfs", source="x")]}
    ),
    "bundle": Fault(Code.INVALID_ARGUMENT, "config.json", text="{"),
    "command": Fault(Code.NOT_FOUND, "no such program", refused_by_guest=True),
    "user": Fault(Code.INVALID_ARGUMENT, "no such user", refused_by_guest=True),
    "mount source": Fault(Code.INVALID_ARGUMENT, "/no/source", config=_mount),
    "stream": Fault(Code.INVALID_ARGUMENT, "/no/such/fifo", request={"stdout": "/no/such/fifo"}),
    "annotation": Fault(
        None, "is not running", config=lambda config: config.update(annotations=pod("container", "nobody"))
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
async def test_ten_failed_creates(
    containerd: FakeContainerd,
    agent: FakeAgent,
    config: Path,
    name: str,
    host_watch: host.HostWatch,
    reason: str,
) -> None:
    fault = FAULTS[reason]
    key, replacement = fault.setting
    config.write_text("\n".join(
        line.replace(key, replacement, 1) if key and line.startswith(key) else line
        for line in config.read_text().splitlines()
    ))  # fmt: skip
    if fault.refused_by_guest and fault.code is not None:
        for nth in range(1, TIMES + 1):
            agent.fail("CreateContainer", fault.code, fault.words, nth=nth)
    opened: list[list[str]] = []
    for attempt in range(TIMES):
        written = spec(shell("exec sleep 100"))
        fault.config(written)
        bundle = containerd.bundle(f"{name}-{attempt}", written)
        if fault.text:
            (bundle / "config.json").write_text(fault.text)
        message = await refusal(containerd, bundle, fault)
        assert fault.words in message
        assert "\n" not in message
        assert host_watch.leftovers() == []
        opened.append(host.open_files(os.getpid()))
    assert len(opened[-1]) == len(opened[0])
    assert containerd.events.items == []


async def refusal(containerd: FakeContainerd, bundle: Path, fault: Fault) -> str:
    """What containerd is told; the shim, if there was one, is gone."""
    if fault.code is None:
        answer = await containerd.run("start", bundle.name, bundle)
        assert answer.code == 1
        return answer.output.decode()
    shim = await containerd.start(bundle.name, bundle)
    with pytest.raises(RpcError) as caught:
        await shim.create(**fault.request)
    assert caught.value.code is fault.code
    await shim.shutdown()
    assert (await containerd.delete(shim.id, bundle)).exit_status == 137
    await shim.client.aclose()
    return caught.value.message

"""Fixtures of the process tests: the real shim program, with everything around it replaced by small fakes.

No test leaves anything on the host: `host_watch` compares, and shows what is left.
"""

from __future__ import annotations

import json
import os
import secrets
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support import host
from tests.support.bundles import shell, spec
from tests.support.fake_agent import FakeAgent
from tests.support.fake_containerd import FakeContainerd
from tests.support.fake_qemu import FakeQemu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.fake_containerd import Shim

_CONFIG = """\
[hypervisor.qemu]
path = {qemu}
kernel = {file}
initrd = {file}
shared_fs = "none"
accel = "tcg"
vsock = "user"

[agent.kata]
server_addr = {agent}
"""


@pytest.fixture(scope="session", autouse=True)
def _adopted_orphans() -> None:
    if os.geteuid() != 0:
        pytest.skip("the shim needs root: it mounts, and keeps its state in /run")
    host.adopt_orphans()


@pytest.fixture
def name() -> str:
    """An id for a sandbox that nobody else on this host has."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def host_watch(tmp_path: Path) -> Iterator[host.HostWatch]:
    """Fails the test when it leaves anything on the host."""
    watch = host.HostWatch(tmp_path)
    yield watch
    leftovers = watch.leftovers()
    watch.clear()
    host.reap()
    assert leftovers == []


@pytest.fixture
def qemu(tmp_path: Path) -> FakeQemu:
    """The QEMU that the configuration names; tests let it become another variant."""
    return FakeQemu(tmp_path / "qemu")


@pytest_asyncio.fixture
async def agent(tmp_path: Path, host_watch: host.HostWatch) -> AsyncIterator[FakeAgent]:
    """The agent that the configuration names. Its end comes before the look for leftovers."""
    async with FakeAgent(tmp_path / "agent.sock") as agent:
        yield agent


@pytest.fixture
def config(tmp_path: Path, qemu: FakeQemu) -> Path:
    """The configuration file; tests may rewrite it."""
    kernel = tmp_path / "kernel"
    kernel.touch()
    file = tmp_path / "configuration.toml"
    file.write_text(
        _CONFIG.format(
            qemu=json.dumps(str(qemu.path)),
            file=json.dumps(str(kernel)),
            agent=json.dumps(f"unix:{tmp_path}/agent.sock"),
        )
    )
    return file


@pytest_asyncio.fixture
async def containerd(
    tmp_path: Path, host_watch: host.HostWatch, agent: FakeAgent, config: Path
) -> AsyncIterator[FakeContainerd]:
    """containerd, with what still runs shut down in the end."""
    async with FakeContainerd(tmp_path, config, host_watch) as containerd:
        yield containerd
        await containerd.stop_all()


@pytest_asyncio.fixture
async def shim(containerd: FakeContainerd, name: str) -> Shim:
    """A shim whose container runs, and sleeps; some modules have one of their own."""
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create()
    await shim.call("Start")
    return shim

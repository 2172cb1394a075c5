"""An agent on this host: real processes and pipes, but no containers, cgroups or mounts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from guest_agent import container as container_module
from guest_agent.cgroup import Cgroup
from guest_agent.log import Log
from guest_agent.modules import Modules
from guest_agent.reaper import Reaper
from guest_agent.sandbox import Sandbox
from guest_agent.watch import FileWatch
from tests.unit.guest_agent.fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def reaper() -> AsyncIterator[Reaper]:
    reaper = Reaper()
    reaper.start()
    yield reaper
    reaper.stop()


@pytest.fixture
async def engine(reaper: Reaper, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(reaper)
    monkeypatch.setattr(Cgroup, "kill", lambda self: engine.kill_all(self.name.rpartition("/")[2]))
    yield engine
    engine.close()
    # What was killed has to be waited for, or the next test's reaper finds it.
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Mount points of root file systems, as a container's bundle would have them."""
    now: list[str] = []

    def unmount(target: str) -> None:
        if target in now:
            now.remove(target)

    monkeypatch.setattr(container_module, "mount", lambda source, target, kind, options: now.append(target))
    monkeypatch.setattr(container_module, "unmount", unmount)
    monkeypatch.setattr(container_module, "is_mount_point", lambda path: path in now)
    return now


@pytest.fixture
async def watch() -> AsyncIterator[FileWatch]:
    watch = FileWatch()
    yield watch
    watch.close()


@pytest.fixture
def sandbox(
    engine: FakeEngine, watch: FileWatch, reaper: Reaper, mounts: list[str], tmp_path: Path
) -> Sandbox:
    modules = Modules(f"{tmp_path}/none", f"{tmp_path}/none")
    for directory in (tmp_path / "cgroup", tmp_path / "cgroup/kata"):
        directory.mkdir()
        (directory / "cgroup.controllers").write_text("cpu memory\n")
        (directory / "cgroup.subtree_control").touch()
    return Sandbox(
        engine,  # type: ignore[arg-type]
        modules,
        watch,
        reaper,
        Log(console_fd=None),
        bundles=f"{tmp_path}/bundles",
        cgroup_root=f"{tmp_path}/cgroup",
    )

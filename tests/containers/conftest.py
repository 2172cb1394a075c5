"""Fixtures of tests that start real containers on this host, with the engine in this process or as `runk`.

They need root. Nothing of them may stay: processes, open files, mounts, control groups, state.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import launcher
import pytest

from tests.support import host
from tests.support.containers import Containers, unpack_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Generous, since the machine may be busy."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(60))


@pytest.fixture(scope="session", autouse=True)
def _adopted_orphans() -> None:
    if os.geteuid() != 0:
        pytest.skip("containers are made by root")
    host.adopt_orphans()


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all that do not write to it."""
    folder = tmp_path_factory.mktemp("rootfs")
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o755)  # users of containers go through them
    return unpack_root(folder)


@pytest.fixture
def own_rootfs(tmp_path: Path) -> Path:
    """One to write to."""
    return unpack_root(tmp_path / "own-rootfs")


@pytest.fixture
def containers(tmp_path: Path, rootfs: Path) -> Iterator[Containers]:
    """Fails the test that leaves anything."""
    files = sorted(os.listdir("/proc/self/fd"))
    processes = host.descendants(os.getpid())
    made = Containers(tmp_path, rootfs, f"t{secrets.token_hex(4)}")
    yield made
    left = made.leftovers()
    made.clear()
    host.reap()
    running = host.descendants(os.getpid())
    left += [f"process {pid}: {words}" for pid, words in running.items() if pid not in processes]
    host.kill(pid for pid in running if pid not in processes)
    assert left == []
    assert sorted(os.listdir("/proc/self/fd")) == files


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runk` as it is installed."""
    path = tmp_path_factory.mktemp("bin") / launcher.RUNTIME_NAME
    folders = [ROOT, *map(Path, [each for each in sys.path if each.endswith("site-packages")])]
    launcher.write(
        path, launcher.render(launcher.RUNTIME_SOURCE, python=Path(sys.executable), folders=folders)
    )
    return path


@pytest.fixture
def runk(program: Path, containers: Containers) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Calls it with the test's folder of states; `stdin` is closed unless given."""

    def call(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
        command = [str(program), "--root", str(containers.folder / "state"), *map(str, arguments)]
        options: dict[str, object] = {
            "capture_output": True,
            "text": True,
            "stdin": subprocess.DEVNULL,
        } | more
        return subprocess.run(command, check=False, **options)  # type: ignore[call-overload, no-any-return]

    return call

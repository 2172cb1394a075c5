"""`runk` called by somebody else than root: containers in a user namespace, without control groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launcher
import pytest

from tests.support import host
from tests.support.containers import unpack_root

if TYPE_CHECKING:
    from collections.abc import Iterator

_UID, _GID = 54321, 54322
_SWITCH = Path("/proc/sys/user/max_user_namespaces")
pytestmark = pytest.mark.skipif(
    not _SWITCH.exists() or _SWITCH.read_text().strip() == "0", reason="this host has no user namespaces"
)


class Rootless:
    """The program, and one bundle, which both belong to nobody that the host knows."""

    def __init__(self, folder: Path) -> None:
        self.bundle = folder / "bundle"
        self._state = folder / "runtime"
        self._program = folder / launcher.RUNTIME_NAME
        root = Path(__file__).resolve().parents[2]
        folders = [root, *map(Path, [each for each in sys.path if each.endswith("site-packages")])]
        launcher.write(
            self._program,
            launcher.render(launcher.RUNTIME_SOURCE, python=Path(sys.executable), folders=folders),
        )
        unpack_root(self.bundle / "rootfs")
        self._state.mkdir()
        for each in (self._state, self.bundle, *self.bundle.rglob("*")):
            os.chown(each, _UID, _GID, follow_symlinks=False)

    def __call__(self, *words: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"capture_output": True, "stdin": subprocess.DEVNULL} | more
        return subprocess.run(
            [self._program, *words], text=True, check=False, user=_UID, group=_GID, extra_groups=[], timeout=60,
            cwd=self.bundle, env={"XDG_RUNTIME_DIR": str(self._state), "PATH": os.environ["PATH"]}, **options,
        )  # fmt: skip

    def write(self, *args: str, **linux: object) -> dict[str, Any]:
        (self.bundle / "config.json").unlink(missing_ok=True)
        assert self("spec", "--rootless").returncode == 0
        document: dict[str, Any] = json.loads((self.bundle / "config.json").read_text())
        document["process"] |= {"terminal": False, "args": list(args)}
        document["linux"] |= linux
        (self.bundle / "config.json").write_text(json.dumps(document))
        return document


@pytest.fixture
def rootless(tmp_path: Path) -> Iterator[Rootless]:
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o755)  # this user goes through them
    processes = host.descendants(os.getpid())
    made = Rootless(tmp_path)
    yield made
    for container in made("list", "-q").stdout.split():
        made("delete", "--force", container)
    host.reap()
    assert [words for pid, words in host.descendants(os.getpid()).items() if pid not in processes] == []
    assert list(tmp_path.glob("runtime/runk/*")) == []


def test_run(rootless: Rootless) -> None:
    script = "id; cat /proc/self/uid_map; hostname; echo more > /dev/null; touch /x; exit 3"
    rootless.write("sh", "-c", script)
    done = rootless("run", "c1")
    assert done.returncode == 3
    ids, mapping, name = done.stdout.splitlines()
    assert ids == "uid=0(root) gid=0(root)"
    assert mapping.split() == ["0", str(_UID), "1"]
    assert name == "runk"
    assert "Read-only file system" in done.stderr


def test_life(rootless: Rootless) -> None:
    rootless.write("sleep", "1000")
    done = rootless("create", "c1", stdout=None, stderr=None, capture_output=False)
    assert done.returncode == 0
    assert rootless("start", "c1").returncode == 0
    state = json.loads(rootless("state", "c1").stdout)
    assert (state["status"], state["owner"]) == ("running", f"#{_UID}")
    assert rootless("exec", "c1", "sh", "-c", "id -u; exit 4").returncode == 4
    assert json.loads(rootless("ps", "--format", "json", "c1").stdout) == [state["pid"]]
    assert "no control group, and so cannot be paused" in rootless("pause", "c1").stderr
    assert "no control group, and so has no statistics" in rootless("events", "--stats", "c1").stderr
    assert "no control group to limit" in rootless("update", "--memory", "5000000", "c1").stderr
    assert rootless("delete", "--force", "c1").returncode == 0
    assert rootless("list", "-q").stdout == ""


def test_refusals(rootless: Rootless) -> None:
    rootless.write("true", resources={"memory": {"limit": 5_000_000}})
    refused = rootless("run", "c1")
    assert (refused.returncode, "has no control group to limit" in refused.stderr) == (1, True)
    rootless.write("true")
    assert "get no control groups" in rootless("--systemd-cgroup", "run", "c1").stderr
    mappings = [{"containerID": 0, "hostID": _UID, "size": 1}, {"containerID": 1, "hostID": 1, "size": 9}]
    rootless.write("true", uidMappings=mappings)
    refused = rootless("run", "c1")
    assert refused.returncode == 1
    assert "linux.uidMappings: " in refused.stderr
    assert "newuidmap" in refused.stderr
    assert rootless("list", "-q").stdout == ""

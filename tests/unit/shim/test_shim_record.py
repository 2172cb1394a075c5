"""The record of a sandbox, and cleaning up from it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import cleanup, paths, record
from shim.record import Record
from shim.start import is_listening

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RUN_ROOT", str(tmp_path / "run"))
    monkeypatch.setattr(paths, "SHARED_ROOT", str(tmp_path / "kata-containers" / "shared" / "sandboxes"))
    return tmp_path


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "100"]) as process:
        yield process
        process.kill()


def started(process: subprocess.Popen[bytes]) -> int:
    found = record.start_time(process.pid)
    assert found is not None
    return found


def write(found: Record, sandbox_id: str = "s1") -> None:
    Path(paths.run_dir(sandbox_id)).mkdir(parents=True)
    found.write(sandbox_id)


def test_round_trip() -> None:
    made = Record("ns", "/bundle", "/sock", 5, 6)
    made.helpers = {"qemu": (7, 8)}
    write(made)
    found = record.read("s1")
    assert found is not None
    assert vars(found) == vars(made)
    assert os.listdir(paths.run_dir("s1")) == ["record.json"]


GOOD = {"namespace": "n", "bundle": "b", "socket": "s", "pid": 1, "start_time": 1}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "5", "{}", "\0\0\0", "\x80",
        *map(json.dumps, (
            GOOD | {"pid": "x"}, GOOD, GOOD | {"helpers": [1]}, GOOD | {"helpers": {"q": 1}},
            GOOD | {"helpers": {"q": [1, None]}}, GOOD | {"pid": None, "helpers": {}},
        )),
    ],
)  # fmt: skip
def test_unreadable_record_is_none(text: str) -> None:
    Path(paths.run_dir("s1")).mkdir(parents=True)
    Path(paths.run_dir("s1"), "record.json").write_bytes(text.encode("latin-1"))
    assert record.read("s1") is None
    cleanup.clean_up("s1")
    assert not Path(paths.run_dir("s1")).exists()


def test_a_record_of_before_control_groups_were_in_it() -> None:
    Path(paths.run_dir("s1")).mkdir(parents=True)
    Path(paths.run_dir("s1"), "record.json").write_text(
        json.dumps(GOOD | {"helpers": {"qemu": [7, 8]}, "network": ["/ns", [2]]})
    )
    found = record.read("s1")
    assert found is not None
    assert (found.helpers, found.network, found.cgroup) == ({"qemu": (7, 8)}, ("/ns", [2]), [])


def test_start_time_of_a_process_with_a_strange_name(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "100"]) as process:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
            assert record.start_time(process.pid) == int(fields[22 - 3])
        finally:
            process.kill()


def test_start_time_of_the_dead() -> None:
    process = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert record.start_time(process.pid) is None  # a zombie
    process.wait()
    assert record.start_time(process.pid) is None


def test_clean_up_kills_daemon_and_helpers(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "100"]) as helper:
        made = Record("ns", "/bundle", str(tmp_path / "sock"), process.pid, started(process))
        made.helpers = {"qemu": (helper.pid, started(helper))}
        write(made)
        (tmp_path / "sock").touch()
        Path(paths.shared_dir("s1"), "rw", "passthrough").mkdir(parents=True)
        cleanup.clean_up("s1")
        assert (process.wait(), helper.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert os.listdir(tmp_path) == []
    cleanup.clean_up("s1")


def test_what_cannot_be_removed_keeps_nothing_else_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(folders: list[str]) -> None:
        raise OSError(16, "Device or resource busy", *folders)

    made = Record("ns", "/bundle", str(tmp_path / "sock"), 1, 0)
    made.cgroup = ["/sys/fs/cgroup/pod"]
    write(made)
    Path(paths.shared_dir("s1"), "rw", "passthrough").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(cleanup, "_remove_cgroup", busy)
        with pytest.raises(OSError, match="busy: '/sys/fs/cgroup/pod'"):
            cleanup.clean_up("s1")
    assert not Path(paths.shared_dir("s1")).exists()
    assert record.read("s1") is not None
    made.cgroup = []
    made.write("s1")
    cleanup.clean_up("s1")
    assert os.listdir(tmp_path) == []


def test_a_reused_pid_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    write(Record("ns", "/bundle", "/no/sock", process.pid, started(process) - 1))
    cleanup.clean_up("s1")
    assert process.poll() is None


def test_other_sandboxes_are_left_alone(tmp_path: Path) -> None:
    write(Record("ns", "/bundle", "/no/sock", 1, 0), "s1")
    write(Record("ns", "/bundle", "/no/sock", 1, 0), "s2")
    cleanup.clean_up("s1")
    assert record.read("s2") is not None


def test_socket_of_the_successor_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    path.touch()
    write(Record("ns", "/bundle", str(path), 1, 0))
    cleanup.clean_up("s1", keep_socket=str(path))
    assert path.exists()


def test_is_listening(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        assert not is_listening(path)
        sock.listen()
        assert is_listening(path)
    assert not is_listening(path)
    with suppress(FileNotFoundError):
        os.unlink(path)

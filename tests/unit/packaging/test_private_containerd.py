"""Identity, start and end of the private containerd, with small programs in containerd's place."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import private_containerd
import pytest
import sandboxes
from cri_config import CriConfig, Handler
from private_containerd import ContainerdError, PrivateContainerd, choose_folder, end_process, start_ticks

# Tells that it is ready like containerd, then does nothing until it is ended.
READY = """\
import os, signal, socket
name = os.environ["NOTIFY_SOCKET"]
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"STATUS=almost", "\\0" + name[1:])
    notify.sendto(b"READY=1", "\\0" + name[1:])
signal.pause()
"""
DYING = "import sys; sys.exit('cannot open the database')"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"


def server(tmp_path: Path, source: str) -> PrivateContainerd:
    """A private containerd whose program is the given Python code."""
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "containerd"
    program.write_text(f"#!{sys.executable} -I\n{source}\n")
    program.chmod(0o755)
    return PrivateContainerd(folder=tmp_path / "c", programs=programs)


def test_start_ticks_names_living_processes_only() -> None:
    assert start_ticks(os.getpid()) is not None
    child = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child.pid) is None  # a zombie
    child.wait()
    assert start_ticks(child.pid) is None


def test_starts_once_and_stops(tmp_path: Path) -> None:
    containerd = server(tmp_path, READY)
    assert containerd.start() is True
    pid = containerd.pid()
    assert pid is not None
    assert containerd.start() is False
    # Another object, as in another process, finds the same one.
    assert PrivateContainerd(folder=containerd.folder).pid() == pid
    end_process(pid, 10)
    assert containerd.pid() is None


def test_failing_start_quotes_the_log(tmp_path: Path) -> None:
    containerd = server(tmp_path, DYING)
    with pytest.raises(ContainerdError, match="status 1 while starting") as caught:
        containerd.start()
    assert "cannot open the database" in str(caught.value)
    assert str(containerd.log) in str(caught.value)
    assert containerd.pid() is None


def test_hanging_start_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_containerd, "START_TIMEOUT_S", 1.0)
    containerd = server(tmp_path, "import os, signal; print(os.getpid(), flush=True); signal.pause()")
    with pytest.raises(ContainerdError, match="did not become ready"):
        containerd.start()
    assert start_ticks(int(containerd.log.read_text())) is None


def test_recycled_process_id_is_not_ours(tmp_path: Path) -> None:
    containerd = PrivateContainerd(folder=tmp_path)
    (tmp_path / "containerd.pid").write_text(f"{os.getpid()} 1\n")
    assert containerd.pid() is None
    assert containerd.stop() is False


def test_end_process_does_not_stop_at_sigterm() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        end_process(child.pid, 0.1)
        child.returncode = 0  # reaped by end_process
    assert start_ticks(child.pid) is None


@pytest.mark.parametrize(("length", "fits"), [(60, True), (83, True), (84, False), (200, False)])
def test_folder_is_chosen_by_socket_length(length: int, fits: bool) -> None:
    wanted, fallback = Path("/" + "x" * (length - 1)), Path("/run/short")
    assert choose_folder(wanted, fallback) == (wanted if fits else fallback)
    assert fits == (len(f"{wanted}/s/containerd.sock.ttrpc") <= 107)


def test_configuration_stays_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / 'with "quotes"'
    containerd = server(tmp_path, READY)
    containerd = PrivateContainerd(folder=folder, programs=containerd.programs)
    containerd.start()
    end_process(containerd.pid() or 0, 10)
    written = tomllib.loads((folder / "containerd.toml").read_text())
    places = [written["root"], written["state"], written["grpc"]["address"]]
    assert all(Path(place).is_relative_to(folder) for place in places)
    assert "io.containerd.grpc.v1.cri" in written["disabled_plugins"]


@pytest.mark.parametrize(
    ("answer", "generation", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", 1, 2),
        ("containerd github.com/containerd/containerd/v2 2.1.9+unknown ", 2, 3),
        ("containerd github.com/containerd/containerd/v2 v12.0.0 0123456789abcdef", 12, 3),
    ],
)
def test_cri_is_configured_in_the_files_version(
    tmp_path: Path, answer: str, generation: int, version: int
) -> None:
    tell = f"import sys\nif '--version' in sys.argv: print({answer!r}); sys.exit()\n{READY}"
    cri = CriConfig(
        snapshotter="native",
        pause_image="pause",
        handlers={"ours": Handler(runtime_type="io.containerd.ours.v2")},
        networks=tmp_path,
        network_programs=tmp_path,
    )
    containerd = dataclasses.replace(server(tmp_path, tell), cri=cri)
    assert containerd.generation() == generation
    containerd.start()
    end_process(containerd.pid() or 0, 10)
    written = tomllib.loads((containerd.folder / "containerd.toml").read_text())
    assert written["version"] == version
    assert not any("cri" in name for name in written["disabled_plugins"])
    assert written["plugins"]["io.containerd.grpc.v1.cri"]["stream_server_address"] == "127.0.0.1"


def test_unknown_version_is_an_error(tmp_path: Path) -> None:
    containerd = server(tmp_path, "print('containerd is my name')")
    with pytest.raises(ContainerdError, match=r"cannot tell the version of .*'containerd is my name"):
        containerd.generation()


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContainerdError, match=f"containerd is not in {tmp_path}"):
        PrivateContainerd(folder=tmp_path / "c", programs=tmp_path).start()


def test_shims_of_others_are_not_ours(tmp_path: Path) -> None:
    mine = PrivateContainerd(folder=tmp_path)
    code = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
    arguments = ["-namespace", "x", "-address"]
    with (
        subprocess.Popen([*code, *arguments, str(mine.socket)], stdout=subprocess.PIPE) as ours,
        subprocess.Popen([*code, *arguments, f"{mine.socket}.other"], stdout=subprocess.PIPE) as others,
    ):
        for process in (ours, others):
            assert process.stdout is not None
            process.stdout.readline()
        try:
            assert mine.shims() == [ours.pid]
        finally:
            ours.kill()
            others.kill()


def test_sandboxes_are_told_apart_by_their_bundle(tmp_path: Path) -> None:
    state = tmp_path / "state"
    mine = PrivateContainerd(folder=tmp_path / "mine")
    records = {
        "a": f'{{"bundle": "{mine.folder}/state/io.containerd.runtime.v2.task/default/a"}}',
        "b": f'{{"bundle": "{mine.folder}-other/b"}}',
        "c": '{"bundle"',
        "d": "[]",
        "e": "{}",
    }
    for name, text in records.items():
        (state / name).mkdir(parents=True)
        (state / name / "record.json").write_text(text)
    assert sandboxes.left(mine, state=state) == ["a"]
    mine.folder.mkdir()
    notes = tmp_path / "notes"
    shim = tmp_path / "shim"
    shim.write_text(f'#!/bin/sh\necho "$@" > {notes}\n')
    shim.chmod(0o755)
    assert sandboxes.clean_up(mine, shim, keep=["a"], state=state) == []
    assert not notes.exists()
    assert sandboxes.clean_up(mine, shim, state=state) == ["a"]
    assert notes.read_text() == f"-namespace default -id a -bundle {mine.folder} delete\n"


def test_mount_points_with_odd_names(monkeypatch: pytest.MonkeyPatch) -> None:
    points = (r"/w/a\040b", r"/w/a\040b/c", "/v", "/wider")
    lines = "".join(f"1 2 0:3 / {point} rw - tmpfs x rw\n" for point in points)
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    found = PrivateContainerd(folder=Path("/w")).mounts()
    assert found == [Path("/w/a b/c"), Path("/w/a b")]

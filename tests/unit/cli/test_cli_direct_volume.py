"""`kata-py direct-volume`: what it writes is what the shim reads."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from cli import direct_volume
from cli.main import app
from shim import disk_needs, paths

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INFO = json.dumps({"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "options": []})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared" / "direct-volumes"
    for module in (disk_needs, direct_volume):
        monkeypatch.setattr(module, "DIRECT_VOLUMES", str(folder))
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["direct-volume", *arguments])
    return result.exit_code, result.output


def test_a_description_comes_and_goes(place: Path) -> None:
    path = "/var/lib/kubelet/pods/1/volumes/v"
    for info in (INFO, INFO.replace("ext4", "xfs")):
        assert run("add", "--volume-path", path, "--mount-info", info) == (0, "")
        found = disk_needs._mount_info(path)
        assert found is not None
        assert (found.device, found.fstype) == ("/dev/sdf", json.loads(info)["fstype"])
    assert [len(files) for _, _, files in os.walk(place)] == [0, 1]
    assert run("add", "--volume-path", "/other", "--mount-info", INFO) == (0, "")
    for _ in range(2):
        assert run("remove", "--volume-path", path) == (0, "")
    assert disk_needs._mount_info(path) is None
    assert place.exists()
    assert run("remove", "--volume-path", "/other") == (0, "")
    assert not place.exists()


@pytest.mark.parametrize(
    ("path", "info", "message"),
    [
        ("relative", INFO, "--volume-path 'relative' is not an absolute path"),
        ("/x", "{", "--mount-info is no description of a volume: "),
        ("/x", "{}", "missing required field `volume-type`"),
        ("/x", INFO.replace("/dev/sdf", "sdf"), "device 'sdf' is not an absolute path"),
    ],
)
def test_what_is_refused(place: Path, path: str, info: str, message: str) -> None:
    status, said = run("add", "--volume-path", path, "--mount-info", info)
    assert status == 1
    assert message in said
    assert len(said.splitlines()) == 1
    assert not place.exists()


# Volumes in use: what the daemons of sandboxes are asked


@pytest.fixture
def sandboxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RUN_ROOT", str(tmp_path / "run"))
    return tmp_path / "run"


@contextmanager
def sandbox(folder: Path, name: str, answer: bytes) -> Iterator[list[bytes]]:
    """A daemon that answers in this way, and what it was asked."""
    asked: list[bytes] = []
    (folder / name).mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / name / "shim-monitor.sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while not request.endswith(b"}" if b"/resize" in request else b"\r\n\r\n"):
                    request += connection.recv(65536)
                asked.append(request)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(20)


def reply(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_the_sandbox_that_has_it_answers(sandboxes: Path) -> None:
    (sandboxes / "starts").mkdir(parents=True)
    with (
        sandbox(sandboxes, "other", reply("404 Not Found", "no container here has it\n")),
        sandbox(sandboxes, "ours", reply("200 OK", '{"usage": []}')) as asked,
    ):
        assert run("stats", "--volume-path", "/csi/v 1") == (0, '{"usage": []}\n')
    assert asked[0].startswith(b"POST /direct-volume/stats?path=/csi/v%201 HTTP/1.1\r\n")
    with sandbox(sandboxes, "second", reply("200 OK", "")) as asked:
        for name in ("other", "ours"):
            (sandboxes / name / "shim-monitor.sock").unlink()
        assert run("resize", "--volume-path", "/v", "--size", "1073741824") == (0, "")
    assert asked[0].endswith(b'\r\n\r\n{"VolumePath":"/v","Size":1073741824}')


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply("409 Conflict", "it only grows\n"), "volume /v in sandbox s: it only grows"),
        (b"", "sandbox s does not answer: Remote end closed connection without response"),
        (b"hello\r\n", "sandbox s does not answer: hello"),
    ],
)
def test_a_refusal_is_one_line(sandboxes: Path, answer: bytes, message: str) -> None:
    with sandbox(sandboxes, "s", answer):
        status, said = run("resize", "--volume-path", "/v", "--size", "512")
    assert (status, said.strip()) == (1, f"kata-py: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stats", "--volume-path", "v"), "--volume-path 'v' is not an absolute path"),
        (("stats", "--volume-path", "/v"), "no container that runs here has the direct volume /v"),
        (
            ("resize", "--volume-path", "/v", "--size", "512"),
            "no container that runs here has the direct volume /v",
        ),
        (("resize", "--volume-path", "/v", "--size", "0"), "--size '0' is not a number of bytes"),
        (("resize", "--volume-path", "/v", "--size", "1G"), "--size '1G' is not a number of bytes"),
        (
            ("resize", "--volume-path", "/v", "--size", "9" * 30),
            f"--size '{'9' * 30}' is not a number of bytes",
        ),
        (("resize", "--volume-path", "/v", "--size", "²"), "--size '²' is not a number of bytes"),
    ],
)
def test_nobody_is_asked(sandboxes: Path, words: tuple[str, ...], message: str) -> None:
    assert run(*words) == (1, f"kata-py: {message}\n")

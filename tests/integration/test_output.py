"""Output of many short containers, each in a virtual machine of its own, to the last byte; files and loggers."""

from __future__ import annotations

import hashlib
import os
import pty
import random
import subprocess
import sys
import termios
import time
import tty
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.containerd import Containerd

LIVES = 50
AT_ONCE = 2
# Text, because a terminal changes bytes; lines, because it changes their ends.
TEXT = b"\n".join(random.Random(7).randbytes(31).hex().encode() for _ in range((1 << 20) // 63)) + b"\n"
LOGGER = """\
#!{python} -ISu
import os, sys, threading
folder = dict(zip(sys.argv[1::2], sys.argv[2::2]))["--folder"]
def keep(fd, name):
    with open(os.path.join(folder, name), "wb") as file:
        while data := os.read(fd, 65536):
            file.write(data)
with open(os.path.join(folder, "id"), "w") as file:
    file.write(os.environ["CONTAINER_NAMESPACE"] + " " + os.environ["CONTAINER_ID"])
if "--byte" in sys.argv:
    os.write(5, b"1")
os.close(5)
out = threading.Thread(target=keep, args=(3, "out"))
out.start()
keep(4, "err")
out.join()
"""


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Options of `ctr run` by which a container finds TEXT in /text."""
    file = tmp_path / "text"
    file.write_bytes(TEXT)
    return ["--mount", f"type=bind,src={file},dst=/text,options=rbind:ro"]


@pytest.mark.timeout(1200)
def test_fifty_short_lives(containerd: Containerd, data: list[str]) -> None:
    def live(number: int) -> list[str]:
        trailer = f"the end of {number}\n"
        to_stdout, to_stderr = (f"cat /text{to}; echo the end of {number}{to}; " for to in ("", " >&2"))
        kind = ("stdout", "stderr", "both", "terminal")[number % 4]
        script = {
            "stdout": to_stdout,
            "stderr": to_stderr,
            "both": to_stdout + to_stderr,
            "terminal": to_stdout,
        }
        options = ["--rm", *data, *(["--tty"] if kind == "terminal" else [])]
        arguments = containerd.run_arguments(
            containerd.new_id(), ["sh", "-c", f"{script[kind]}exit {number}"], options=options
        )
        argv = containerd.server.ctr_argv(*arguments, namespace=containerd.namespace)
        whole = TEXT + trailer.encode()
        want = {
            "stdout": (whole, b""), "stderr": (b"", whole), "both": (whole, whole),
            "terminal": (whole.replace(b"\n", b"\r\n"), b""),
        }  # fmt: skip
        status, out, err = (on_a_terminal if kind == "terminal" else with_pipes)(argv)
        wrong = [f"exits with {status}"] if status != number else []
        for stream, got, whole in (("stdout", out, want[kind][0]), ("stderr", err, want[kind][1])):
            if got != whole:
                wrong.append(f"{stream} has {len(got)} bytes, not {len(whole)}; it ends with {got[-80:]!r}")
        return [f"{kind} {number}: {what}" for what in wrong]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [line for lines in pool.map(live, range(LIVES)) for line in lines]
    assert not wrong, "\n".join(wrong)


def test_slow_reader(containerd: Containerd, data: list[str]) -> None:
    """It gets every byte, and nobody waits for it."""
    container = containerd.new_id()
    command = ["sh", "-c", "cat /text /text /text; echo the end"]
    with containerd.popen(*containerd.run_arguments(container, command, options=["--rm", *data])) as client:
        assert client.stdout is not None
        received = client.stdout.read(1)
        for number in range(3):
            done = containerd.exec(container, "echo", str(number))
            assert (done.returncode, done.stdout) == (0, f"{number}\n"), done.stderr
            for _ in range(20):
                received += client.stdout.read(1024)
                time.sleep(0.05)  # the reader's pace
        received += client.stdout.read()
        assert client.wait(60) == 0
    assert received == TEXT * 3 + b"the end\n"


def with_pipes(argv: list[str]) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of a program."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def on_a_terminal(argv: list[str]) -> tuple[int, bytes, bytes]:
    """Exit status and output of a program with a terminal of its own, which changes nothing by itself."""
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        modes = termios.tcgetattr(slave)
        modes[1] &= ~termios.ONLCR  # ctr switches output processing on again
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        with subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        ) as process:
            os.close(slave)
            output = b"".join(iter(lambda: _read_terminal(master), b""))
            return process.wait(timeout=60), output, b""
    finally:
        os.close(master)


def _read_terminal(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # EIO: nobody has the other side any more
        return b""


def test_into_a_file(containerd: Containerd, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "log"
    script = "echo out; echo err >&2"
    for _ in range(2):
        done = containerd.run("sh", "-c", script, options=["--rm", "--log-uri", f"file://{file}"])
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(file.read_text().splitlines()) == ["err", "err", "out", "out"]


@pytest.mark.parametrize(
    "uri", ["binary://{path}?--folder={folder}", "binary-v2://{path}?--folder={folder}&--byte"]
)
def test_into_a_logger(containerd: Containerd, data: list[str], tmp_path: Path, uri: str) -> None:
    path = tmp_path / "logger"
    path.write_text(LOGGER.format(python=sys.executable))
    path.chmod(0o755)
    container = containerd.new_id()
    options = ["--rm", *data, "--log-uri", uri.format(path=path, folder=tmp_path)]
    script = "cat /text; cat /text >&2; echo the end >&2"
    done = containerd.run("sh", "-c", script, container=container, options=options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "id").read_text() == f"{containerd.namespace} {container}"
    want = [hashlib.sha256(whole).hexdigest() for whole in (TEXT, TEXT + b"the end\n")]
    assert [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("out", "err")] == want


def test_a_logger_that_is_missing(containerd: Containerd) -> None:
    done = containerd.run("true", options=["--rm", "--log-uri", "binary:///no/such/logger"])
    assert done.returncode != 0
    assert "cannot run the logger /no/such/logger of container" in done.stderr
    assert "No such file or directory" in done.stderr

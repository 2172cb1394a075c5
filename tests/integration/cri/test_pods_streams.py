"""Streams of a pod and its containers: exec, attach and port-forward as kubectl does them, terminals, and the logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.kubelet import eventually, read_log
from tests.integration.cri.streams import PORT, STDERR, STDOUT, StreamError, Streams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.client import Cri
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20
# Answers one connection to a port of its own choice, which it prints.
SERVER = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    connected, _ = listener.accept()
    with connected:
        connected.sendall(connected.recv(100).upper())
"""


@pytest.fixture(scope="module")
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    """One virtual machine for all tests here."""
    with kubelet.pod("streams") as pod:
        yield pod


@pytest.fixture(scope="module")
def container(pod: Pod) -> str:
    """A container to run commands in."""
    return pod.run("sleeper")


def test_exec_sync_keeps_the_streams_apart(cri: Cri, container: str) -> None:
    done = cri.exec(container, ["sh", "-c", "echo out; echo err >&2; exit 5"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 5)


def test_exec_sync_brings_all_of_a_large_output(cri: Cri, container: str) -> None:
    done = cri.exec(container, ["sh", "-c", f"dd if=/dev/zero bs=65536 count={2 * MIB // 65536} 2>/dev/null"])
    assert (len(done.stdout), done.exit_code) == (2 * MIB, 0)


def test_exec_has_stdin_and_an_exit_status(cri: Cri, container: str) -> None:
    url = cri.exec_url(container, ["sh", "-c", "read line; echo got $line; echo bad >&2; exit 7"])
    with Streams(url) as streams:
        streams.send(b"this\n")
        assert streams.finish() == 7
    assert streams.received[STDOUT] == b"got this\n"
    assert streams.received[STDERR] == b"bad\n"


def test_exec_with_a_terminal_follows_its_size(cri: Cri, container: str) -> None:
    command = ["sh", "-c", "echo ready; read line; stty size; exit 4"]
    with Streams(cri.exec_url(container, command, tty=True)) as streams:
        streams.wait_for(b"ready")
        streams.resize(columns=101, rows=37)
        streams.send(b"\n")
        assert streams.finish() == 4
    assert b"37 101\r\n" in streams.received[STDOUT]


def test_exec_in_a_terminal_echoes_and_interrupts(cri: Cri, container: str) -> None:
    with Streams(cri.exec_url(container, ["sh"], tty=True)) as streams:
        streams.wait_for(b"# ")
        # The job itself tells that it is there: by then it is what the terminal sends signals to.
        streams.send(b"sh -c 'echo $((6 * 7)); exec sleep 1000'\n")
        streams.wait_for(b"42\r\n")
        streams.send(b"\x03")
        streams.wait_for(b"^C")
        streams.send(b"exit 3\n")
        assert streams.finish() == 3


def test_exec_of_a_missing_program_says_so(cri: Cri, container: str) -> None:
    with (
        Streams(cri.exec_url(container, ["/no/such/program"], stdin=False)) as streams,
        pytest.raises(StreamError, match="/no/such/program"),
    ):
        streams.finish()


def test_attach_joins_leaves_and_comes_back(cri: Cri, pod: Pod) -> None:
    command = [
        "sh",
        "-c",
        "while read line; do echo out $line; echo err $line >&2; [ $line != end ] || exit 6; done",
    ]
    container = pod.run("echo", command, stdin=True)
    for word in (b"one", b"two"):
        with Streams(cri.attach_url(container)) as streams:
            streams.send(word + b"\n")
            streams.wait_for(b"out " + word)
            streams.wait_for(b"err " + word, STDERR)
            assert streams.received[STDOUT] == b"out " + word + b"\n", "only what came since it attached"
    with Streams(cri.attach_url(container)) as streams:
        streams.send(b"end\n")
        streams.wait_for(b"out end")
    assert pod.finished(container).exit_code == 6
    # The log has everything, whoever was attached.
    assert pod.output("echo") == "out one\nout two\nout end\n"
    assert pod.output("echo", stream="stderr") == "err one\nerr two\nerr end\n"
    cri.remove(container)


def test_attach_to_a_terminal(cri: Cri, pod: Pod) -> None:
    container = pod.run("terminal", ["sh"], stdin=True, tty=True)
    with Streams(cri.attach_url(container, tty=True)) as streams:
        streams.resize(columns=93, rows=31)
        streams.send(b"stty size; exit 9\n")
        streams.wait_for(b"31 93\r\n")
    assert pod.finished(container).exit_code == 9
    cri.remove(container)


def test_stdin_once_ends_with_its_first_client(cri: Cri, pod: Pod) -> None:
    container = pod.run("once", ["sh", "-c", "cat; exit 8"], stdin=True, stdin_once=True)
    with Streams(cri.attach_url(container)) as streams:
        streams.send(b"through\n")
        streams.wait_for(b"through\n")
    assert pod.finished(container).exit_code == 8
    cri.remove(container)


def log_lines(path: Path) -> list[tuple[str, str, str]]:
    """Stream, tag and text of each line of a log; its time has to be one."""
    lines = []
    for line in path.read_text().splitlines():
        time, stream, tag, text = line.split(" ", 3)
        assert "T" in time
        lines.append((stream, tag, text))
    return lines


def test_log_keeps_streams_order_and_partial_lines(cri: Cri, pod: Pod) -> None:
    container = pod.run("log", ["sh", "-c", "echo first; printf partial; sleep 0.3; echo problem >&2"])
    assert pod.finished(container).exit_code == 0
    lines = log_lines(pod.logs / "log_0.log")
    assert [line for line in lines if line[0] == "stdout"] == [
        ("stdout", "F", "first"),
        ("stdout", "P", "partial"),
    ]
    assert ("stderr", "F", "problem") in lines
    cri.remove(container)


def test_log_of_a_line_longer_than_a_log_line(cri: Cri, pod: Pod) -> None:
    size = 40_000  # the limit is 16 KiB
    container = pod.run("long", ["sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x; echo; echo end"])
    assert pod.finished(container).exit_code == 0
    assert pod.output("long") == "x" * size + "\nend\n"
    assert [tag for _, tag, _ in log_lines(pod.logs / "long_0.log")] == ["P", "P", "F", "F"]
    cri.remove(container)


def test_log_of_much_output_is_complete(cri: Cri, pod: Pod) -> None:
    container = pod.run("much", ["seq", "1", "20000"])
    assert pod.finished(container).exit_code == 0
    assert pod.output("much") == "".join(f"{number}\n" for number in range(1, 20001))
    cri.remove(container)


def test_log_is_reopened_after_rotation(cri: Cri, pod: Pod) -> None:
    container = pod.run(
        "rotated", ["sh", "-c", "echo before; while ! [ -e /go ]; do sleep 0.1; done; echo after"]
    )
    path, old = pod.logs / "rotated_0.log", pod.logs / "rotated_0.log.1"
    eventually(lambda: path.exists() and "before" in path.read_text(), "the first line is in the log")
    path.rename(old)
    cri.reopen_log(container)
    pod.exec(container, "touch", "/go")
    assert pod.finished(container).exit_code == 0
    assert (read_log(old, "stdout"), read_log(path, "stdout")) == ("before\n", "after\n")
    cri.remove(container)


def test_port_forward_reaches_the_pods_network_namespace(cri: Cri, pod: Pod) -> None:
    """Which is on the host: containerd looks for the port there."""
    record = json.loads(Path("/run/kata-py", pod.id, "record.json").read_text())
    namespace = f"--net=/proc/{record['helpers']['qemu'][0]}/ns/net"
    argv = ["nsenter", namespace, sys.executable, "-c", SERVER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            with Streams(cri.port_forward_url(pod.id, int(server.stdout.readline()))) as streams:
                streams.send(b"hello")
                streams.wait_for(b"HELLO", PORT)
        finally:
            server.kill()

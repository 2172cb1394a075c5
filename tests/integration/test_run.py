"""`ctr run`: a container in its own microVM, its exit status, its streams, and what its spec asks for."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from subprocess import Popen

    from tests.integration.containerd import Containerd

MIB = 1 << 20


def test_prints_the_guests_own_kernel(containerd: Containerd) -> None:
    done = containerd.run("uname", "-a")
    assert done.returncode == 0, done.stderr
    assert platform.release() not in done.stdout
    assert done.stdout.startswith("Linux ")


def test_exit_status_is_the_commands(containerd: Containerd) -> None:
    done = containerd.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_killed_by_a_signal_is_128_plus_its_number(containerd: Containerd) -> None:
    assert containerd.run("sh", "-c", "sh -c 'kill -9 $$'; exit $?").returncode == 137


def test_environment_and_directory(containerd: Containerd) -> None:
    options = ["--rm", "--env", "GREETING=good day", "--cwd", "/tmp"]
    done = containerd.run("sh", "-c", 'echo "$GREETING"; pwd', options=options)
    assert done.stdout.splitlines() == ["good day", "/tmp"], done.stderr


def test_read_only_root(containerd: Containerd) -> None:
    done = containerd.run("sh", "-c", "echo x > /new", options=["--rm", "--read-only"])
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_written_root_is_the_containers_own(containerd: Containerd) -> None:
    assert containerd.run("sh", "-c", "echo here > /new && cat /new").stdout == "here\n"
    assert containerd.run("test", "-e", "/new").returncode == 1


def test_limits_reach_the_containers_cgroup(containerd: Containerd) -> None:
    # Which cgroup it is depends on whether containerd asks for a cgroup namespace.
    script = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && cat memory.max cpu.max"
    cgroup = ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"]
    options = ["--rm", "--memory-limit", str(64 * MIB), "--cpus", "0.5", *cgroup]
    done = containerd.run("sh", "-c", script, options=options)
    assert done.stdout.splitlines() == [str(64 * MIB), "50000 100000"], done.stderr


def test_bind_mounts_of_directory_and_file(containerd: Containerd, tmp_path: os.PathLike[str]) -> None:
    folder, file = os.path.join(tmp_path, "folder"), os.path.join(tmp_path, "file")
    os.mkdir(folder)
    with open(file, "w") as stream:
        stream.write("from the host\n")
    mounts = [
        "--mount", f"type=bind,src={folder},dst=/data,options=rbind:rw",
        "--mount", f"type=bind,src={file},dst=/one,options=rbind:ro",
        "--mount", "type=tmpfs,src=shm,dst=/dev/shm,options=size=80m",
    ]  # fmt: skip
    script = "cat /one > /data/copy; stat -f -c '%b %S' /dev/shm; echo x > /one"
    done = containerd.run("sh", "-c", script, options=["--rm", *mounts])
    blocks, size = done.stdout.split()
    assert int(blocks) * int(size) == 80 * MIB
    with open(os.path.join(folder, "copy")) as stream:
        assert stream.read() == "from the host\n"
    assert "Read-only file system" in done.stderr
    with open(file) as stream:
        assert stream.read() == "from the host\n"


@pytest.mark.parametrize("size", [1, MIB])
def test_bytes_pass_unchanged_both_ways(containerd: Containerd, size: int) -> None:
    container = containerd.start("sleep", "1000")
    try:
        bytes_pass_both_ways(containerd, container, size)
    finally:
        containerd.remove(container)


def bytes_pass_both_ways(containerd: Containerd, container: str, size: int) -> None:
    """Random bytes through `cat` in an exec, which unlike `ctr run` is told when the input ends."""
    data = random.Random(size).randbytes(size)
    exec_id = containerd.new_id("e")
    fifos = containerd.server.fifo_options()
    process = containerd.popen("tasks", "exec", *fifos, "--exec-id", exec_id, container, "cat")
    out, err = _communicate(process, data)
    assert (process.returncode, err) == (0, b"")
    assert len(out) == size
    assert hashlib.sha256(out).hexdigest() == hashlib.sha256(data).hexdigest()


def test_stdin_of_the_init_process(containerd: Containerd) -> None:
    data = random.Random(1).randbytes(MIB)
    arguments = containerd.run_arguments(
        containerd.new_id(), ["sh", "-c", f"head -c {MIB}"], options=["--rm"]
    )
    process = containerd.popen(*arguments)
    out, err = _communicate(process, data)
    assert (process.returncode, err) == (0, b"")
    assert out == data


def test_a_megabyte_before_the_exit_is_all_there(containerd: Containerd) -> None:
    script = f"head -c {MIB} /dev/zero | tr '\\0' x; echo trailer; echo problem >&2"
    done = containerd.run("sh", "-c", script)
    assert done.stdout == "x" * MIB + "trailer\n"
    assert done.stderr == "problem\n"


def test_three_sandboxes_at_once(containerd: Containerd) -> None:
    results: dict[str, int] = {}

    def run(status: str) -> None:
        results[status] = containerd.run("sh", "-c", f"exit {status}", timeout_s=200).returncode

    threads = [threading.Thread(target=run, args=(str(number),)) for number in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"3": 3, "4": 4, "5": 5}


def _communicate(process: Popen[bytes], data: bytes) -> tuple[bytes, bytes]:
    with process:
        try:
            return process.communicate(data, timeout=60)
        finally:
            process.kill()

"""`runk` as a program, as containerd, Podman and people call it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.support.containers import in_terminal, spec, wait

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.containers import Containers

    Runk = Callable[..., subprocess.CompletedProcess[str]]


def test_run(containers: Containers, runk: Runk) -> None:
    container_id, bundle = containers.bundle(spec("sh", "-c", "cat; echo out; echo err >&2; exit 3"))
    done = runk("run", "--bundle", bundle, container_id, stdin=None, input="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "in\nout\n", "err\n")


def test_interpreter_cannot_be_overwritten_from_the_container(containers: Containers, program: Path) -> None:
    """Whoever opens /proc/PID/exe of a process that enters a container gets a file on a read-only mount."""
    container_id, bundle = containers.bundle(spec("sleep", "1000"))
    command = [program, "--root", containers.folder / "state", "create", "--bundle", bundle, container_id]
    subprocess.run([str(each) for each in command], check=True, stdin=subprocess.DEVNULL, timeout=60)
    pid = containers.engine.load(container_id).pid
    assert os.statvfs(f"/proc/{pid}/exe").f_flag & os.ST_RDONLY
    containers.engine.delete(container_id)


def test_verbs_as_a_shim_calls_them(containers: Containers, runk: Runk, tmp_path: Path) -> None:
    document = spec("sleep", "1000")
    document["annotations"] = {"some": "thing"}
    container_id, bundle = containers.bundle(document)
    log = tmp_path / "log.json"
    flags = ("--log", log, "--log-format", "json")
    pid_file = tmp_path / "pid"
    created = runk(*flags, "create", "--bundle", bundle, "--pid-file", pid_file, container_id, stdout=None, stderr=None,
                   capture_output=False)  # fmt: skip
    assert created.returncode == 0
    pid = int(pid_file.read_text())
    told = json.loads(runk("state", container_id).stdout)
    assert (told["id"], told["pid"], told["status"], told["bundle"]) == (
        container_id,
        pid,
        "created",
        str(bundle),
    )
    assert told["annotations"] == {"some": "thing"}
    assert runk("start", container_id).returncode == 0
    refused = runk(*flags, "start", container_id)
    assert refused.returncode == 1
    assert "cannot start a container in the running state" in refused.stderr
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["level"], last["msg"]) == ("error", "cannot start a container in the running state")

    process = tmp_path / "process.json"
    process.write_text(
        json.dumps({"args": ["sh", "-c", "echo more; exit 6"], "cwd": "/", "env": ["PATH=/bin"]})
    )
    done = runk("exec", "--process", process, "--pid-file", tmp_path / "exec.pid", container_id)
    assert (done.returncode, done.stdout) == (6, "more\n")
    done = runk(
        "exec",
        "--cwd",
        "/tmp",
        "--env",
        "A=b c",
        "--user",
        "7:8",
        container_id,
        "sh",
        "-c",
        "pwd; id -u; echo $A",
    )
    assert done.stdout.splitlines() == ["/tmp", "7", "b c"]
    done = runk("exec", container_id, "no-such")
    assert (done.returncode, "executable file not found in $PATH" in done.stderr) == (127, True)
    done = runk("exec", container_id)
    assert "neither a process file nor a command" in done.stderr

    assert json.loads(runk("ps", "--format", "json", container_id).stdout) == [pid]
    header, *rows = runk("ps", container_id).stdout.splitlines()
    assert "PID" in header.split()
    assert [row.split()[-2:] for row in rows] == [["sleep", "1000"]]
    header, row = runk("list").stdout.splitlines()
    assert header.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert row.split()[:4] == [container_id, str(pid), "running", str(bundle)]
    assert row.split()[5] == "root"
    assert json.loads(runk("list", "--format", "json").stdout)[0]["id"] == container_id
    assert runk("list", "-q").stdout == f"{container_id}\n"

    assert runk("pause", container_id).returncode == 0
    assert json.loads(runk("state", container_id).stdout)["status"] == "paused"
    assert runk("resume", container_id).returncode == 0
    update = runk(
        "update", "--resources", "-", container_id, stdin=None, input=json.dumps({"pids": {"limit": 9}})
    )
    assert update.returncode == 0
    assert runk("update", "--memory", "50000000", container_id).returncode == 0
    event: Any = json.loads(runk("events", "--stats", container_id).stdout)
    assert (event["type"], event["id"], event["data"]["pids"]["limit"]) == ("stats", container_id, 9)
    assert event["data"]["memory"]["usage"]["limit"] == 50_000_000 // 4096 * 4096

    assert "not stopped" in runk("delete", container_id).stderr
    assert "unknown signal" in runk("kill", container_id, "NOSUCH").stderr
    assert runk("kill", "--all", container_id, "sigkill").returncode == 0
    assert wait(pid) == 137
    assert runk("delete", container_id).returncode == 0
    gone = runk("state", container_id)
    assert (gone.returncode, gone.stderr) == (1, f"runk: container {container_id} does not exist\n")


def test_terminals(containers: Containers, runk: Runk, program: Path) -> None:
    """Ours is the container's: its size, its keys, its end."""
    document = spec("sh", "-c", "stty size; read line; echo got $line; tty -s && exit 9")
    document["process"]["terminal"] = True
    container_id, bundle = containers.bundle(document)
    command = [program, "--root", containers.folder / "state", "run", "--bundle", bundle, container_id]
    status, said = in_terminal([str(each) for each in command], b"hello\n")
    assert status == 9
    assert "50 120" in said
    assert "got hello" in said

    container_id, pid = containers.running()
    command = [
        program,
        "--root",
        containers.folder / "state",
        "exec",
        "-t",
        container_id,
        "sh",
        "-c",
        "tty; exit 2",
    ]
    status, said = in_terminal([str(each) for each in command], b"")
    assert status == 2
    assert "/dev/pts/" in said
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_preserved_files(containers: Containers, program: Path) -> None:
    container_id, bundle = containers.bundle(spec("sh", "-c", "cat <&4; cat <&5"))
    command = (
        f"exec 3</dev/null 4<<A 5</dev/null\nthrough four\nA\nexec {program} --root {containers.folder}/state run \
        --preserve-fds 2 --bundle {bundle} {container_id}"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "through four\n"
    assert "Bad" in done.stderr or "bad" in done.stderr


def test_refusals(containers: Containers, runk: Runk, tmp_path: Path) -> None:
    container_id, bundle = containers.bundle(spec("true"))
    refused = runk("--systemd-cgroup", "run", "--bundle", bundle, container_id)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert (
        "linux.cgroupsPath: want slice:prefix:name" in refused.stderr
        or "--systemd-cgroup: " in refused.stderr
    )
    assert "invalid container id" in runk("state", "../x").stderr
    nothing = runk("create", "--bundle", tmp_path, "nothing")
    assert (nothing.returncode, "there is no such file" in nothing.stderr) == (1, True)
    document = spec("true")
    document["linux"]["intelRdt"] = {"closID": "x"}
    container_id, bundle = containers.bundle(document)
    refused = runk("run", "--bundle", bundle, container_id)
    assert refused.stderr == "runk: linux.intelRdt: Intel's resource control is not supported\n"
    missing = containers.bundle(spec("no-such"))
    assert runk("run", "--bundle", missing[1], missing[0]).returncode == 127


def test_spec_and_features(runk: Runk, tmp_path: Path) -> None:
    assert runk("spec", "--bundle", tmp_path).returncode == 0
    assert json.loads((tmp_path / "config.json").read_text())["hostname"] == "runk"
    assert "exists already" in runk("spec", "--bundle", tmp_path).stderr
    told = json.loads(runk("features").stdout)
    assert {"rbind", "rro", "noexec"} <= set(told["mountOptions"])
    assert told["linux"]["seccomp"]["enabled"] is True
    assert told["linux"]["mountExtensions"]["idmap"]["enabled"] is True

"""The life of containers: verbs and states, hooks, limits, one more process, and a caller with threads and a loop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.cgroups import device_program, device_rules
from oci_engine.cgroups.v2 import CgroupV2
from oci_engine.container import Engine
from oci_engine.errors import (
    AlreadyExists,
    CannotExecute,
    HookFailed,
    NotFound,
    SetupFailed,
    SpecError,
    StateConflict,
)
from oci_engine.options import CreateOptions, Streams
from oci_engine.resources_spec import DeviceRule, Resources
from oci_engine.undo import Undo
from runk.foreground import ConsoleSocket
from tests.support import host
from tests.support.containers import remove_group, spec, wait

if TYPE_CHECKING:
    from tests.support.containers import Containers, Spec

#: Whether this host has control groups of version 2 alone, and where it has those that it has.
ONLY_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
UNIFIED = Path("/sys/fs/cgroup") if ONLY_V2 else Path("/sys/fs/cgroup/unified")


def state(containers: Containers, container_id: str) -> str:
    return containers.engine.state_of(containers.engine.load(container_id))


def test_states_and_what_each_refuses(containers: Containers) -> None:
    engine = containers.engine
    container_id, pid, _ = containers.create(spec("sleep", "1000"))
    assert state(containers, container_id) == "created"
    with pytest.raises(AlreadyExists, match="already exists"):
        engine.create(container_id, str(containers.folder / f"bundle-{container_id}"), CreateOptions())
    with pytest.raises(StateConflict, match="cannot resume a container in the created state"):
        engine.resume(container_id)
    engine.start(container_id)
    assert state(containers, container_id) == "running"
    with pytest.raises(StateConflict, match="cannot start a container in the running state"):
        engine.start(container_id)
    with pytest.raises(StateConflict, match="not stopped: running"):
        engine.delete(container_id)
    engine.pause(container_id)
    assert state(containers, container_id) == "paused"
    for refused in (lambda: engine.pause(container_id), lambda: containers.exec(container_id, "true")):
        with pytest.raises(StateConflict, match="paused"):
            refused()
    engine.resume(container_id)
    assert state(containers, container_id) == "running"
    engine.kill(container_id, signal.SIGKILL)
    wait(pid)
    assert state(containers, container_id) == "stopped"
    with pytest.raises(StateConflict, match="cannot start a container in the stopped state"):
        engine.start(container_id)
    with pytest.raises(StateConflict, match="container not running"):
        engine.kill(container_id, signal.SIGTERM)
    with pytest.raises(StateConflict, match="cannot exec in a stopped container"):
        containers.exec(container_id, "true")
    engine.delete(container_id)
    with pytest.raises(NotFound, match="does not exist"):
        engine.delete(container_id)
    assert engine.delete(container_id, force=True) == []


def test_killing_one_that_is_paused(containers: Containers) -> None:
    container_id, pid = containers.running()
    containers.engine.pause(container_id)
    containers.engine.kill(container_id, signal.SIGKILL)
    assert wait(pid) == 137
    containers.engine.delete(container_id)


def test_deleting_one_that_was_only_created(containers: Containers) -> None:
    container_id, pid, _ = containers.create(spec("true"))
    containers.engine.delete(container_id)
    assert wait(pid) == 137


def test_signals_to_everyone(containers: Containers) -> None:
    script = (
        "trap 'echo main' USR1; (trap 'echo child; exit' USR1; echo ready; while :; do :; done) & wait; wait"
    )
    container_id, pid, output = containers.create(spec("sh", "-c", script))
    containers.engine.start(container_id)
    while "ready" not in output.read_text():
        os.sched_yield()
    containers.engine.kill(container_id, signal.SIGUSR1, everyone=True)
    assert wait(pid) == 0
    assert sorted(output.read_text().split()) == ["child", "main", "ready"]
    containers.engine.delete(container_id)


def test_processes_that_outlive_the_first_one_end_with_delete(containers: Containers) -> None:
    holder, first = containers.running()
    document = spec("sh", "-c", "sleep 1000 & exit 3")
    for each in document["linux"]["namespaces"]:
        if each["type"] == "pid":
            each["path"] = f"/proc/{first}/ns/pid"
    container_id, pid, _ = containers.create(document)
    containers.engine.start(container_id)
    assert wait(pid) == 3
    assert len(containers.engine.pids(container_id)) == 1
    containers.engine.delete(container_id)
    containers.engine.delete(holder, force=True)
    wait(first)


def test_a_reused_pid_is_not_taken_for_the_container(containers: Containers) -> None:
    container_id, pid = containers.running()
    path = Path(containers.engine.load(container_id).root) / container_id / "status.json"
    record = json.loads(path.read_text())
    assert record["processStartTime"] > 0
    assert record["config"]["noPivotRoot"] is False
    path.write_text(json.dumps(record | {"processStartTime": record["processStartTime"] - 1}))
    assert state(containers, container_id) == "stopped"
    with pytest.raises(StateConflict, match="not running"):
        containers.engine.kill(container_id, signal.SIGKILL)
    assert host.is_running(pid)
    path.write_text(json.dumps(record))
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_state_that_cannot_be_read_is_removed(containers: Containers) -> None:
    folder = containers.folder / "state" / "broken"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text("{")
    with pytest.raises(NotFound, match="cannot be read"):
        containers.engine.load("broken")
    containers.engine.delete("broken")
    assert not folder.exists()


def test_hooks(containers: Containers, tmp_path: Path) -> None:
    log = tmp_path / "hooks.log"

    def hook(kind: str, program: str = "/bin/sh") -> dict[str, Any]:
        place = "/out/hooks.log" if kind == "startContainer" else str(log)
        script = f'state=$(cat); echo {kind} $$ $A "$state" >> {place}'
        return {
            "path": program,
            "args": ["sh", "-c", script],
            "env": ["A=b", "PATH=/bin:/usr/bin"],
            "timeout": 30,
        }

    log.touch()
    document = spec("sh", "-c", "echo main >> /out/hooks.log")
    document["annotations"] = {"a": "b"}
    document["mounts"].append(
        {"destination": "/out", "type": "bind", "source": str(tmp_path), "options": ["bind"]}
    )
    document["root"]["path"] = str(_with_out(containers, tmp_path))
    document["hooks"] = {
        kind: [hook(kind)]
        for kind in (
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        )
    }
    container_id, pid, _ = containers.create(document)
    containers.engine.start(container_id)
    assert wait(pid) == 0
    containers.engine.delete(container_id)
    lines = log.read_text().splitlines()
    kinds = [line.split()[0] for line in lines]
    assert kinds[:4] == ["prestart", "createRuntime", "createContainer", "startContainer"]
    assert sorted(kinds[4:6]) == ["main", "poststart"]
    assert kinds[6:] == ["poststop"]
    for line in lines:
        if line != "main":
            kind, _, variable, text = line.split(" ", 3)
            told = json.loads(text)
            assert variable == "b"
            assert (told["id"], told["annotations"]) == (container_id, {"a": "b"})
            # Those that run in the container are told of its process as it is seen there.
            seen_pid = {"createContainer": 1, "startContainer": 1, "poststop": None}.get(kind, pid)
            status = {"startContainer": "created", "poststart": "running", "poststop": "stopped"}.get(
                kind, "creating"
            )
            assert (told.get("pid"), told["status"]) == (seen_pid, status)


def _with_out(containers: Containers, tmp_path: Path) -> Path:
    root = tmp_path / "with-out"
    root.mkdir()
    for entry in containers.rootfs.iterdir():
        if entry.is_symlink() or entry.name in ("bin", "etc", "usr", "lib"):
            os.symlink(os.readlink(entry), root / entry.name) if entry.is_symlink() else _link_tree(
                entry, root
            )
        else:
            (root / entry.name).mkdir()
    (root / "out").mkdir()
    return root


def _link_tree(entry: Path, root: Path) -> None:
    for folder, _, files in os.walk(entry):
        place = root / Path(folder).relative_to(entry.parent)
        place.mkdir()
        for name in files:
            os.link(Path(folder) / name, place / name, follow_symlinks=False)


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_failing_hook_leaves_nothing(containers: Containers, kind: str) -> None:
    document = spec("true")
    document["hooks"] = {kind: [{"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"]}]}
    with pytest.raises((HookFailed, SetupFailed), match=f"{kind} hook /bin/sh ended with status 3: why"):
        containers.create(document)
    assert containers.engine.ids() == []


def test_hook_that_takes_too_long(containers: Containers) -> None:
    document = spec("true")
    document["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]}
    with pytest.raises(HookFailed, match="took longer than its 1 s"):
        containers.create(document)


def test_failing_poststart_hook_ends_the_container(containers: Containers) -> None:
    document = spec("sleep", "1000")
    document["hooks"] = {"poststart": [{"path": "/bin/false"}]}
    container_id, pid, _ = containers.create(document)
    with pytest.raises(HookFailed, match="poststart hook /bin/false ended with status 1"):
        containers.engine.start(container_id)
    assert wait(pid) == 137
    containers.engine.delete(container_id)


def test_one_more_process(containers: Containers) -> None:
    container_id, pid = containers.running()
    status, output = containers.exec(
        container_id, "sh", "-c", "readlink /proc/self/ns/net; hostname; id -u; pwd; cat /proc/self/cgroup; exit 5",
        cwd="/tmp", user={"uid": 1000, "gid": 1000},
    )  # fmt: skip
    assert status == 5
    lines = output.splitlines()
    assert lines[:4] == [os.readlink(f"/proc/{pid}/ns/net"), "runk", "1000", "/tmp"]
    group = f"0::/{container_id}" if ONLY_V2 else f"freezer:/{container_id}"
    assert any(line.endswith(group) for line in lines)
    assert len(containers.engine.pids(container_id)) == 1
    for program, code in (("no-such", 127), ("/etc/passwd", 126)):
        with pytest.raises(CannotExecute) as caught:
            containers.exec(container_id, program)
        assert caught.value.status == code
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_terminal(containers: Containers) -> None:
    with Undo() as undo:
        console = ConsoleSocket(undo)
        document = spec("sh", "-c", "tty; stty size; ls -l /dev/console; test -t 0 && echo yes")
        document["process"] |= {"terminal": True, "consoleSize": {"height": 33, "width": 77}}
        container_id, bundle = containers.bundle(document)
        pid = containers.engine.create(
            container_id, str(bundle), CreateOptions(streams=Streams(console_socket=console.path))
        )
        master = console.terminal()
        containers.engine.start(container_id)
        said = b""
        while True:
            try:
                said += os.read(master, 4096)
            except OSError:
                break
        os.close(master)
        assert wait(pid) == 0
        lines = said.decode().replace("\r", "").splitlines()
        assert lines[0] == "/dev/pts/0" or lines[0] == "/dev/console"
        assert lines[1] == "33 77"
        assert lines[2].startswith("crw")
        assert lines[3] == "yes"
        containers.engine.delete(container_id)


def test_terminal_without_a_place_to_send_it(containers: Containers) -> None:
    document = spec("true")
    document["process"]["terminal"] = True
    with pytest.raises(SpecError, match="needs a console socket"):
        containers.create(document)


def test_limits(containers: Containers) -> None:
    document = spec("sleep", "1000")
    document["linux"]["resources"] |= {
        "memory": {"limit": 64 << 20, "swap": 64 << 20, "reservation": 32 << 20},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"},
        "pids": {"limit": 7},
    }
    container_id, pid = containers.running(document)

    def values(*files: str) -> list[str]:
        paths = containers.engine.load(container_id).cgroup_paths
        folders = [paths["" if ONLY_V2 else file.split(".")[0]] for file in files]
        return [Path(folder, file).read_text().strip() for folder, file in zip(folders, files, strict=True)]

    def memory_and_swap() -> list[int]:
        """Version 1 counts them together."""
        if not ONLY_V2:
            return [int(each) for each in values("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")]
        memory, swap = map(int, values("memory.max", "memory.swap.max"))
        return [memory, memory + swap]

    assert memory_and_swap() == [64 << 20, 64 << 20]
    if ONLY_V2:
        assert values("memory.low", "cpu.weight", "cpu.max") == [str(32 << 20), "20", "50000 100000"]
    else:
        assert values("cpu.shares", "cpu.cfs_quota_us") == ["512", "50000"]
    assert values("cpuset.cpus", "pids.max") == ["0", "7"]
    _, output = containers.exec(container_id, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done")
    assert "can't fork" in output
    containers.engine.update(
        container_id,
        {"memory": {"limit": 128 << 20, "swap": 256 << 20}, "pids": {"limit": -1}, "cpu": {"quota": -1}},
    )
    assert memory_and_swap() == [128 << 20, 256 << 20]
    assert values("pids.max") == ["max"]
    containers.engine.update(container_id, {"memory": {"limit": 64 << 20, "swap": 64 << 20}})
    assert memory_and_swap() == [64 << 20, 64 << 20]
    stats: Any = containers.engine.stats(container_id)
    assert stats["memory"]["usage"]["limit"] == 64 << 20
    assert stats["pids"]["current"] >= 1
    assert stats["cpu"]["usage"]["total"] > 0
    with pytest.raises(SpecError, match=r"resources\.memory\.limit: want a whole number, got a string"):
        containers.engine.update(container_id, {"memory": {"limit": "1"}})
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_out_of_memory_ends_the_process(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["resources"]["memory"] = {"limit": 32 << 20, "swap": 32 << 20}
        document["mounts"].append({"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"})

    assert containers.sh("exec dd if=/dev/zero of=/dev/shm/x bs=1M count=100", edit)[0] == 137


def test_a_group_with_processes_of_others_is_refused(containers: Containers) -> None:
    container_id, pid = containers.running()
    document = spec("true")
    document["linux"]["cgroupsPath"] = f"/{container_id}"
    with pytest.raises(SetupFailed, match=f"has processes already: {pid}"):
        containers.create(document)
    assert host.is_running(pid)
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_limit_that_this_host_cannot_set(containers: Containers) -> None:
    document = spec("true")
    document["linux"]["resources"]["hugepageLimits"] = [{"pageSize": "3MB", "limit": 0}]
    with pytest.raises(SetupFailed, match=r"linux\.resources\.hugepageLimits: this host"):
        containers.create(document)


def test_fork_from_a_process_with_threads_and_an_event_loop(containers: Containers) -> None:
    """Threads hold locks of Python and of malloc, the loop has a signal handler: the child takes none of it along."""
    stop = threading.Event()
    lock = threading.Lock()
    woken: list[int] = []

    def busy() -> None:
        with lock:
            while not stop.is_set():
                bytearray(100_000)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: woken.append(1))
        os.environ["OF_THE_CALLER"] = "1"
        try:
            for _ in range(3):
                status, output = await asyncio.to_thread(
                    containers.sh, "trap 'echo got; exit 4' USR1; env; kill -USR1 $$"
                )
                assert status == 4
                assert output.endswith("got\n")
                assert "OF_THE_CALLER" not in output
        finally:
            del os.environ["OF_THE_CALLER"]
            loop.remove_signal_handler(signal.SIGUSR1)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert woken == []


@pytest.mark.timeout(180)
def test_five_hundred_one_after_the_other_leave_nothing(containers: Containers) -> None:
    """As a node that lives long has them: with one more process, and with a failure now and then."""

    def one(number: int) -> None:
        if number % 10 == 9:
            with pytest.raises(CannotExecute):
                containers.create(spec("no-such"))
        elif number % 10 == 4:
            container_id, pid = containers.running()
            assert containers.exec(container_id, "sh", "-c", "exit 5") == (5, "")
            containers.engine.delete(container_id, force=True)
            assert wait(pid) == 137
        else:
            assert containers.run(spec("true")) == (0, "")

    for number in range(50):
        one(number)
    before = _own_figures(containers)
    memory = _resident_kib()
    for number in range(500):
        one(number)
    assert _own_figures(containers) == before
    # If the records were kept, each would be 40 KiB.
    assert _resident_kib() - memory < 2048


def _own_figures(containers: Containers) -> dict[str, int]:
    """What must not grow in a process that makes containers, by what it is."""
    return {
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "children": len(host.children(os.getpid())),
        "states": len(containers.engine.ids()),
        "control groups": sum(1 for _ in Path("/sys/fs/cgroup").glob(f"*/{containers.name}*")),
        "files of the engine": len(os.listdir(containers.folder / "state")),
    }


def _resident_kib() -> int:
    gc.collect()
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmRSS:") + 1])


def test_a_caller_that_dies_while_it_creates_leaves_no_process(containers: Containers) -> None:
    document = spec("sleep", "1000")
    document["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    container_id, bundle = containers.bundle(document)
    caller = os.fork()
    if caller == 0:
        try:
            Engine(str(containers.folder / "state")).create(container_id, str(bundle), CreateOptions())
        finally:
            os._exit(1)
    path = containers.folder / "state" / container_id / "status.json"
    while not path.exists():
        os.sched_yield()
    pid = containers.engine.load(container_id).pid
    assert state(containers, container_id) == "creating"
    for each in host.descendants(caller):
        if each != pid:
            os.kill(each, signal.SIGKILL)
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    pidfd = os.pidfd_open(pid)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # an orphan, adopted by this session
    os.close(pidfd)
    containers.engine.delete(container_id)


@pytest.fixture
def group_v2(containers: Containers) -> Any:
    """A group in the tree of version 2, which hosts with version 1 have too."""
    if not (UNIFIED / "cgroup.procs").exists():
        pytest.skip(f"this host has no tree of version 2 at {UNIFIED}")
    group = CgroupV2(f"/{containers.name}-v2/inner", str(UNIFIED))
    group.create()
    yield group
    remove_group(group)
    os.rmdir(UNIFIED / f"{containers.name}-v2")


def test_version_2_freezes_and_kills(group_v2: CgroupV2) -> None:
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    group_v2.add(child)
    assert group_v2.pids() == [child]
    group_v2.freeze(True)
    assert group_v2.is_frozen()
    group_v2.freeze(False)
    assert not group_v2.is_frozen()
    group_v2.freeze(True)
    group_v2.kill()
    assert wait(child) == 137


def test_version_2_devices(group_v2: CgroupV2, tmp_path: Path) -> None:
    """The kernel runs the program; the second one takes the first one's place."""

    def readable(path: str) -> bool:
        child = os.fork()
        if child == 0:
            group_v2.add(os.getpid())
            try:
                os.close(os.open(path, os.O_RDONLY))
            except PermissionError:
                os._exit(1)
            os._exit(0)
        return wait(child) == 0

    kmsg = DeviceRule(allow=True, type="c", major=1, minor=11, access="r")
    group_v2.limit(Resources())
    assert readable("/dev/null")
    assert not readable("/dev/kmsg")
    group_v2.limit(Resources(devices=(kmsg,)))
    assert readable("/dev/kmsg")
    folder = os.open(group_v2.paths[""], os.O_RDONLY)
    assert len(device_program.attached(folder)) == 1
    os.close(folder)
    many = tuple(
        DeviceRule(allow=True, type="b", major=number, minor=None, access="rw") for number in range(200)
    )
    os.close(device_program.load(device_program.assemble(device_rules.complete(many))))

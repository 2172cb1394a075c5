"""What the runtime specification says a runtime must do, seen from inside of a container: one row for each rule.

What it says a runtime must refuse is in the unit tests of the specification's reader.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.container import Engine
from oci_engine.errors import EngineError
from oci_engine.options import CreateOptions
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.containers import Containers, Spec

ZERO = {"type": "c", "major": 1, "minor": 5}
TMPFS = {"type": "tmpfs", "source": "tmpfs"}


def put(path: str, value: object) -> Callable[[Spec], None]:
    """Set a field, by its path with dots; one that ends with + is a list to add to."""

    def edit(document: Spec) -> None:
        *folders, name = path.rstrip("+").split(".")
        place: Any = document
        for folder in folders:
            place = place[int(folder)] if isinstance(place, list) else place.setdefault(folder, {})
        if path.endswith("+"):
            place.setdefault(name, []).extend(value)
        else:
            place[name] = value

    return edit


def namespaces(*kinds: str) -> Callable[[Spec], None]:
    return put("linux.namespaces", [{"type": kind} for kind in kinds])


def without(path: str) -> Callable[[Spec], None]:
    """Without the field at a path with dots."""
    *folders, name = path.split(".")

    def edit(document: Spec) -> None:
        place: Any = document
        for folder in folders:
            place = place[folder]
        del place[name]

    return edit


def both(*edits: Callable[[Spec], None]) -> Callable[[Spec], None]:
    def edit(document: Spec) -> None:
        for each in edits:
            each(document)

    return edit


RULES: list[tuple[str, Callable[[Spec], None], str, str]] = [
    # The rule, the change to the specification, a script, what it has to say.
    ("root.readonly", put("root.readonly", True), "touch /x 2>/dev/null || echo no", "no"),
    (
        "mounts in the order of the list",
        put("mounts+", [{"destination": "/tmp", **TMPFS}, {"destination": "/tmp/in", **TMPFS}]),
        "grep -c ' /tmp' /proc/self/mounts", "2",
    ),
    (
        "the last mount at a place is seen",
        put("mounts+", [{"destination": "/tmp", **TMPFS, "options": [f"size={size}k"]} for size in (64, 128)]),
        "df -k /tmp | tail -1 | awk '{print $2}'", "128",
    ),
    ("cwd", put("process.cwd", "/etc"), "pwd", "/etc"),
    ("env", put("process.env", ["A=1", "B=x y", "A=2", "PATH=/bin"]), "echo $A $B", "2 x y"),
    ("args[0] by PATH", put("process.env", ["PATH=/nowhere:/bin"]), "echo found", "found"),
    (
        "rlimits, soft and hard",
        put("process.rlimits", [{"type": "RLIMIT_NOFILE", "soft": 33, "hard": 44}]),
        "ulimit -Sn; ulimit -Hn", "33 44",
    ),
    (
        "unlimited is the highest number",
        put("process.rlimits", [{"type": "RLIMIT_STACK", "soft": 2**64 - 1, "hard": 2**64 - 1}]),
        "ulimit -s", "unlimited",
    ),
    (
        "capabilities that are not known do not fail it",
        put("process.capabilities.bounding+", ["CAP_OF_TOMORROW"]), "echo runs", "runs",
    ),
    (
        "noNewPrivileges", put("process.noNewPrivileges", True),
        "grep NoNewPrivs /proc/self/status", "NoNewPrivs: 1",
    ),
    ("no noNewPrivileges", put("process.noNewPrivileges", False), "grep NoNewPrivs /proc/self/status", "NoNewPrivs: 0"),
    ("oomScoreAdj", put("process.oomScoreAdj", 77), "cat /proc/self/oom_score_adj", "77"),
    ("user, uid and gid", put("process.user", {"uid": 12, "gid": 34}), "id -u; id -g", "12 34"),
    ("umask", put("process.user", {"uid": 0, "gid": 0, "umask": 0o77}), "umask", "0077"),
    ("additionalGids", put("process.user", {"uid": 5, "gid": 6, "additionalGids": [7]}), "id -G", "6 7"),
    ("hostname", put("hostname", "by-the-book"), "hostname", "by-the-book"),
    ("domainname", put("domainname", "book.example"), "cat /proc/sys/kernel/domainname", "book.example"),
    ("unknown fields are ignored", put("linux.ofTomorrow", {"x": [1]}), "echo runs", "runs"),
    (
        "annotations of unknown keys are no error",
        put("annotations", {"org.example/any": "thing"}), "echo runs", "runs",
    ),
    (
        "default file systems are there for all",
        put("linux.maskedPaths", []),
        "for d in proc sys dev/pts dev/shm; do grep -q \" /$d \" /proc/self/mounts && echo $d; done",
        "proc sys dev/pts dev/shm",
    ),
    (
        "default devices",
        put("linux.resources.devices", [{"allow": False, "access": "rwm"}]),
        "for d in null zero full random urandom tty; do test -c /dev/$d && echo $d; done; readlink /dev/ptmx",
        "null zero full random urandom tty pts/ptmx",
    ),
    (
        "links in /dev", put("linux.devices", []), "readlink /dev/fd; readlink /dev/stdin; readlink /dev/stderr",
        "/proc/self/fd /proc/self/fd/0 /proc/self/fd/2",
    ),
    (
        "devices with type, mode and owner",
        put("linux.devices", [{"path": "/dev/d/z", **ZERO, "fileMode": 0o640, "uid": 3, "gid": 4}]),
        "stat -c '%a %u %g %t:%T' /dev/d/z", "640 3 4 1:5",
    ),
    (
        "a device of one path twice is one of the last",
        put("linux.devices", [{"path": "/dev/zero", **ZERO, "fileMode": 0o600}]),
        "stat -c %a /dev/zero", "600",
    ),
    ("maskedPaths cannot be read", put("linux.maskedPaths", ["/etc/passwd"]), "wc -c < /etc/passwd", "0"),
    (
        "readonlyPaths", both(put("root.readonly", False), put("linux.readonlyPaths", ["/tmp"])),
        "touch /tmp/x 2>/dev/null || echo no", "no",
    ),
    ("sysctl", put("linux.sysctl", {"net.ipv4.ip_forward": "1"}), "cat /proc/sys/net/ipv4/ip_forward", "1"),
    ("personality", put("linux.personality", {"domain": "LINUX32"}), "uname -m | grep -c 64", "0"),
    ("a new pid namespace", namespaces("mount", "pid", "uts"), "echo $$", "1"),
    (
        "namespaces that are not listed are the runtime's",
        both(namespaces("mount", "pid", "uts"), put("hostname", "mine")),
        "readlink /proc/self/ns/net", os.readlink("/proc/self/ns/net"),
    ),
    (
        "a new cgroup namespace", put("linux.namespaces+", [{"type": "cgroup"}]),
        "grep -c -v ':/$' /proc/self/cgroup | tr -d 0", "",
    ),
    (
        "timeOffsets",
        both(
            put("linux.namespaces+", [{"type": "time"}]),
            put("linux.timeOffsets", {"boottime": {"secs": 900_000_000}}),
        ),
        "cut -c1-2 /proc/uptime", "90",
    ),
    (
        "no capabilities without the field", without("process.capabilities"),
        "grep CapEff /proc/self/status", f"CapEff: {0:016x}",
    ),
    ("loopback is up in a new network", put("linux.sysctl", {}), "ip -o addr show lo | grep -c 127.0.0.1", "1"),
    (
        "rootfsPropagation", put("linux.rootfsPropagation", "shared"),
        "awk '$5 == \"/\" {print $7}' /proc/self/mountinfo | cut -d: -f1", "shared",
    ),
    (
        "seccomp, with its error number",
        put("linux.seccomp", {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
        }),
        "hostname x 2>&1 | grep -c 'No space'", "1",
    ),
    (
        "scheduler", put("process.scheduler", {"policy": "SCHED_IDLE"}),
        "awk '{print $41}' /proc/self/stat", "5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "script", "said"), [row[1:] for row in RULES], ids=[row[0] for row in RULES]
)
def test_rule(
    containers: Containers, own_rootfs: Path, edit: Callable[[Spec], None], script: str, said: str
) -> None:
    def change(document: Spec) -> None:
        document["root"]["path"] = str(own_rootfs)
        document["hostname"] = ""
        edit(document)

    _, output = containers.sh(script, change)
    assert output.split() == said.split()


def test_state_has_what_it_must(containers: Containers) -> None:
    document = spec("sleep", "1000")
    document["annotations"] = {"x": "y"}
    container_id, pid, _ = containers.create(document)
    status = containers.engine.load(container_id)
    assert (status.oci_version, status.id, status.pid) == (document["ociVersion"], container_id, pid)
    assert os.path.isabs(status.bundle)
    containers.engine.delete(container_id)
    wait(pid)


def test_the_program_does_not_run_before_start(containers: Containers, own_rootfs: Path) -> None:
    document = spec("sh", "-c", "echo > /mark")
    document["root"] |= {"path": str(own_rootfs), "readonly": False}
    container_id, pid, _ = containers.create(document)
    assert not (own_rootfs / "mark").exists()
    # What is written to the bundle after the creation makes no difference.
    (containers.folder / f"bundle-{container_id}" / "config.json").write_text("{}")
    containers.engine.start(container_id)
    assert wait(pid) == 0
    assert (own_rootfs / "mark").exists()
    containers.engine.delete(container_id)


def test_an_error_changes_nothing(containers: Containers) -> None:
    """A verb that fails leaves the container in the state in which it was."""
    container_id, pid = containers.running()
    for wrong in (
        lambda: containers.engine.start(container_id),
        lambda: containers.engine.update(container_id, {"memory": {"limit": "x"}}),
        lambda: containers.exec(container_id, "no-such"),
        lambda: containers.engine.delete(container_id),
    ):
        with pytest.raises(EngineError):
            wrong()
        assert containers.engine.state_of(containers.engine.load(container_id)) == "running"
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_deleting_frees_the_id_and_only_what_was_made(containers: Containers, own_rootfs: Path) -> None:
    before = sorted(os.listdir(own_rootfs))
    document = spec("true")
    document["root"]["path"] = str(own_rootfs)
    container_id, bundle = containers.bundle(document)
    for _ in range(2):
        pid = containers.engine.create(container_id, str(bundle), CreateOptions())
        containers.engine.start(container_id)
        wait(pid)
        containers.engine.delete(container_id)
    assert sorted(os.listdir(own_rootfs)) == before
    assert (bundle / "config.json").exists()


def test_warnings_are_told(containers: Containers) -> None:
    told: list[str] = []
    engine = Engine(str(containers.folder / "state"), warn=told.append)
    document = spec("sleep", "1000")
    document["process"]["capabilities"]["bounding"].append("CAP_NEW")
    container_id, bundle = containers.bundle(document)
    pid = engine.create(container_id, str(bundle), CreateOptions())
    assert [text.partition(":")[0] for text in told] == ["process.capabilities.bounding[3]"]
    engine.delete(container_id)
    wait(pid)

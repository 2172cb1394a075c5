"""Attacks that have worked on container runtimes, each tried with the protection and without it.

Without it they succeed: only so is it shown that the protection is what stops them, and that the test would notice.
The engine forks from this process, so what is taken out here is out in the container's process too.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from oci_engine import child, console, identity, inroot, linux, mounts
from oci_engine.cgroups.v1 import CgroupV1
from oci_engine.errors import EngineError, SetupFailed
from oci_engine.options import CreateOptions, Streams
from oci_engine.plan import CgroupMount
from oci_engine.records import replace
from oci_engine.undo import Undo
from runk.foreground import ConsoleSocket
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.containers import Containers, Spec

#: How often a container is made while somebody changes its root file system.
ROUNDS = 60

protection = pytest.mark.parametrize("protected", [True, False], ids=["protected", "without"])
Patch = pytest.MonkeyPatch


def on(rootfs: Path, *args: str) -> Spec:
    document = spec(*args)
    document["root"] |= {"path": str(rootfs), "readonly": False}
    return document


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host's."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "secret").write_text("of the host\n")
    return folder


def follow_links(monkeypatch: Patch) -> None:
    """Paths as runtimes once looked them up: by name, with every link on the way."""

    def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
        return os.open(path.lstrip("/") or ".", flags | os.O_CLOEXEC, dir_fd=directory)

    monkeypatch.setattr(linux, "openat2", openat2)
    monkeypatch.setattr(inroot, "resolve", lambda root, path: path.strip("/") or ".")


# Files of the caller: CVE-2024-21626, CVE-2016-9962, CVE-2019-5736


@pytest.mark.parametrize(
    ("closes", "looks", "outcome"),
    [(True, True, "No such file"), (False, True, "leads out of the container"), (False, False, "reached")],
)
def test_working_directory_by_an_open_file_of_the_caller(
    containers: Containers, victim: Path, monkeypatch: Patch, closes: bool, looks: bool, outcome: str
) -> None:
    """CVE-2024-21626: /proc/self/fd/N of a directory that the runtime had open leads to the host."""
    folder = os.open(victim, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(folder, True)
    if not closes:
        close = child._close_others
        monkeypatch.setattr(
            child, "_close_others", lambda plan: close(replace(plan, preserved=(*plan.preserved, folder)))
        )
    if not looks:
        monkeypatch.setattr(identity, "enter_directory", os.chdir)
    try:
        document = spec("cat", "secret")
        document["process"]["cwd"] = f"/proc/self/fd/{folder}"
        if outcome == "reached":
            assert containers.run(document) == (0, "of the host\n")
        else:
            with pytest.raises(SetupFailed, match=outcome):
                containers.create(document)
    finally:
        os.close(folder)


@pytest.fixture
def neighbour(containers: Containers) -> Iterator[tuple[str, int]]:
    """A container whose root may do what containers usually may, and whose processes others share."""
    container_id, pid = containers.running()
    yield container_id, pid
    containers.engine.delete(container_id, force=True)
    wait(pid)


@protection
@pytest.mark.parametrize("place", ["exe", "root/etc/passwd", "environ"])
def test_a_process_that_is_being_made_is_not_looked_into(
    containers: Containers, neighbour: tuple[str, int], monkeypatch: Patch, protected: bool, place: str
) -> None:
    """CVE-2016-9962 and CVE-2019-5736: by /proc/PID, while the interpreter of the host waits to become a program."""
    if not protected:
        whole = linux.prctl
        # The caller itself has been closed to others since the first container.
        whole(linux.PR_SET_DUMPABLE, 1)

        def prctl(option: int, second: object = 0, third: object = 0) -> int:
            return 0 if option == linux.PR_SET_DUMPABLE else whole(option, second, third)

        monkeypatch.setattr(linux, "prctl", prctl)
    document = spec("true")
    for namespace in document["linux"]["namespaces"]:
        if namespace["type"] == "pid":
            namespace["path"] = f"/proc/{neighbour[1]}/ns/pid"
    container_id, pid, _ = containers.create(document)
    inside = next(
        line.split()[-1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("NSpid")
    )
    status, output = containers.exec(neighbour[0], "head", "-c", "0", f"/proc/{inside}/{place}")
    assert (status == 0) == (not protected), output
    if protected:
        assert "Permission denied" in output
    containers.engine.delete(container_id)
    wait(pid)


# Paths in the root file system: CVE-2021-30465, CVE-2024-45310, CVE-2019-19921


def aims_of(document: Spec, source: Path) -> None:
    """What makes directories, and files, below a place that the attacker has in hand."""
    document["mounts"] += [
        {"destination": "/a/place/folder", "type": "bind", "source": str(source), "options": ["bind"]},
        {"destination": "/a/place/file", "type": "bind", "source": str(source / "f"), "options": ["bind"]},
        {"destination": "/a/place/memory", "type": "tmpfs", "source": "tmpfs"},
    ]
    document["linux"]["devices"] = [{"path": "/a/place/null", "type": "c", "major": 1, "minor": 3}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "f").touch()
    return folder


@protection
def test_destinations_that_are_links(
    containers: Containers,
    own_rootfs: Path,
    victim: Path,
    source: Path,
    monkeypatch: Patch,
    protected: bool,
) -> None:
    (own_rootfs / "a").mkdir()
    (own_rootfs / "a" / "place").symlink_to(victim)
    document = on(own_rootfs, "true")
    aims_of(document, source)
    if protected:
        assert containers.run(document)[0] == 0
        assert os.listdir(victim) == ["secret"]
        return
    follow_links(monkeypatch)
    containers.run(document)
    assert {"folder", "file", "memory", "null"} <= set(os.listdir(victim))


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Somebody exchanges the two, as fast as possible."""
    stop = threading.Event()

    def swap() -> None:
        renameat2 = ctypes.CDLL(None).renameat2
        names = (linux.AT_FDCWD, os.fsencode(one), linux.AT_FDCWD, os.fsencode(other))
        while not stop.is_set():
            assert renameat2(*names, 2) == 0  # RENAME_EXCHANGE

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_destinations_that_become_links(
    containers: Containers, own_rootfs: Path, victim: Path, source: Path, tmp_path: Path
) -> None:
    """CVE-2021-30465, CVE-2024-45310: a directory by the time it is looked at, a link by the time it is used."""
    outside = tmp_path / "mounts"
    outside.touch()
    (own_rootfs / "a" / "place").mkdir(parents=True)
    (own_rootfs / "a" / "link").symlink_to(victim)
    made = 0
    with swapping(own_rootfs / "a" / "place", own_rootfs / "a" / "link"):
        for _ in range(ROUNDS):
            document = on(own_rootfs, "true")
            aims_of(document, source)
            # Runs where the mounts are made, and before the host's are gone.
            script = f"cat /proc/self/mountinfo >> {outside}"
            document["hooks"] = {"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}
            try:
                containers.run(document)
                made += 1
            except EngineError:
                continue  # seen, and refused
    assert os.listdir(victim) == ["secret"]
    points = {line.split()[4] for line in outside.read_text().splitlines()}
    assert not [point for point in points if point.startswith(str(victim))]
    assert made + len(containers.engine.ids()) <= ROUNDS


@protection
def test_console_that_is_a_link(
    containers: Containers, own_rootfs: Path, victim: Path, monkeypatch: Patch, protected: bool
) -> None:
    """CVE-2025-52565: what is mounted at /dev/console goes where the container's link says, or comes from there."""
    (own_rootfs / "dev" / "pts").mkdir(parents=True, exist_ok=True)
    (own_rootfs / "dev" / "console").symlink_to(victim / "console")
    if not protected:
        follow_links(monkeypatch)
        monkeypatch.setattr(inroot, "make_file", lambda root, path: _create(root, path))
    document = on(own_rootfs, "true")
    document["process"]["terminal"] = True
    document["mounts"] = [each for each in document["mounts"] if each["destination"] != "/dev"]
    with Undo() as undo:
        there = ConsoleSocket(undo)
        container_id, bundle = containers.bundle(document)
        try:
            pid = containers.engine.create(
                container_id, str(bundle), CreateOptions(streams=Streams(console_socket=there.path))
            )
            os.close(there.terminal())
            containers.engine.delete(container_id)
            wait(pid)
        except EngineError:
            assert not protected
    assert (victim / "console").exists() == (not protected)


def _create(root: int, path: str) -> int:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=root))
    return os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=root)


@protection
def test_terminal_of_a_false_devpts(
    containers: Containers, own_rootfs: Path, monkeypatch: Patch, protected: bool
) -> None:
    """The other half of CVE-2025-52565: the terminal itself is whatever the image has at /dev/pts."""
    (own_rootfs / "dev" / "pts").mkdir(parents=True, exist_ok=True)
    os.mknod(own_rootfs / "dev" / "pts" / "ptmx", 0o20666, os.makedev(1, 3))
    if not protected:
        monkeypatch.setattr(child, "open_terminal", _open_anything)
    document = on(own_rootfs, "true")
    document["process"]["terminal"] = True
    document["mounts"] = [each for each in document["mounts"] if not each["destination"].startswith("/dev")]
    with Undo() as undo:
        there = ConsoleSocket(undo)
        container_id, bundle = containers.bundle(document)
        options = CreateOptions(streams=Streams(console_socket=there.path))
        with pytest.raises(SetupFailed) as caught:
            containers.engine.create(container_id, str(bundle), options)
        if protected:
            assert "is not that of a devpts mount" in str(caught.value)
        else:
            fd = there.terminal()
            assert os.fstat(fd).st_rdev == os.makedev(1, 3)
            os.close(fd)


def _open_anything(root: int, process: object, console_socket: int) -> int:
    fd = inroot.open_path(root, "dev/pts/ptmx", os.O_RDWR)
    console._send(console_socket, fd)
    return fd


# /proc: CVE-2019-16884, CVE-2019-19921, CVE-2023-27561, CVE-2023-28642, CVE-2025-52881


def proc_is_a_link(document: Spec, rootfs: Path, evil: Path) -> None:
    (rootfs / "proc").rmdir()
    (rootfs / "proc").symlink_to("tmp")


def volume_at_proc(document: Spec, rootfs: Path, evil: Path) -> None:
    document["mounts"] = [each for each in document["mounts"] if each["destination"] != "/proc"]
    document["mounts"].append(
        {"destination": "/proc", "type": "bind", "source": str(evil), "options": ["bind"]}
    )


def volume_over_a_part(document: Spec, rootfs: Path, evil: Path) -> None:
    document["mounts"].append(
        {"destination": "/proc/sys/net", "type": "bind", "source": str(evil), "options": ["bind"]}
    )


def volume_by_a_link(document: Spec, rootfs: Path, evil: Path) -> None:
    (rootfs / "link").symlink_to("/proc/sys")
    document["mounts"].append(
        {"destination": "/link/net", "type": "bind", "source": str(evil), "options": ["bind"]}
    )


@protection
@pytest.mark.parametrize("arrange", [proc_is_a_link, volume_at_proc, volume_over_a_part, volume_by_a_link])
def test_proc_of_the_attackers(
    containers: Containers,
    own_rootfs: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    protected: bool,
    arrange: Callable[[Spec, Path, Path], None],
) -> None:
    """Labels, sysctls and hidden paths are worth nothing when /proc is the image's or a volume's."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "mark").touch()
    document = on(own_rootfs, "ls", "/proc/mark", "/proc/sys/net/mark", "/tmp/version")
    arrange(document, own_rootfs, evil)
    if protected:
        with pytest.raises(SetupFailed, match="proc"):
            containers.create(document)
        return
    monkeypatch.setattr(mounts, "_check_proc", lambda root, mount: None)
    _, output = containers.run(document)
    # One of the three is there: the attacker has that part of /proc in hand.
    assert output.count("No such file") == 2


@pytest.mark.parametrize(
    ("own_proc", "stays", "outcome"),
    [(True, True, "kernel"), (False, True, "refused"), (False, False, "attacker")],
)
def test_where_settings_are_written(
    containers: Containers,
    own_rootfs: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    own_proc: bool,
    stays: bool,
    outcome: str,
) -> None:
    """CVE-2025-52881: by a mount in the container's /proc, a sysctl or a label is written to another file."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "shmmni").write_text("untouched")
    # As if something of the sort had got there in a race.
    monkeypatch.setattr(mounts, "_check_proc", lambda root, mount: None)
    if not own_proc:
        monkeypatch.setattr(child, "_own_proc", lambda: -2)
        written = identity.write_below

        def write_below(folder: int, path: str, text: str) -> None:
            proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
            if stays:
                written(proc, path, text)
            else:
                (Path("/proc") / path).write_text(text)

        monkeypatch.setattr(identity, "write_below", write_below)
    document = on(own_rootfs, "true")
    document["linux"] |= {"sysctl": {"kernel.shmmni": "1234"}, "readonlyPaths": []}
    document["mounts"].append(
        {"destination": "/proc/sys/kernel", "type": "bind", "source": str(evil), "options": ["bind"]}
    )
    if outcome == "refused":
        with pytest.raises(SetupFailed, match=r"linux\.sysctl\['kernel.shmmni'\]: .*cross-device"):
            containers.create(document)
    else:
        containers.run(document)
    assert (evil / "shmmni").read_text() == ("1234" if outcome == "attacker" else "untouched")


@protection
def test_masked_by_a_null_of_the_attackers(
    containers: Containers, own_rootfs: Path, tmp_path: Path, monkeypatch: Patch, protected: bool
) -> None:
    """CVE-2025-31133: paths are hidden behind /dev/null, and the image says what that is."""
    devices = tmp_path / "devices"
    devices.mkdir()
    (devices / "null").symlink_to("/etc/group")
    (own_rootfs / "etc" / "group").write_text("not empty\n")
    if not protected:
        monkeypatch.setattr(mounts, "_host_null", lambda: _containers_null(own_rootfs))
    document = on(own_rootfs, "cat", "/etc/passwd")
    document["mounts"] = [each for each in document["mounts"] if not each["destination"].startswith("/dev")]
    document["mounts"].append(
        {"destination": "/dev", "type": "bind", "source": str(devices), "options": ["bind"]}
    )
    document["linux"]["maskedPaths"] = ["/etc/passwd"]
    assert containers.run(document) == (0, "" if protected else "not empty\n")


def _containers_null(rootfs: Path) -> int:
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY)
    null = inroot.open_path(root, "dev/null")
    return linux.open_tree(null, "", linux.AT_EMPTY_PATH | linux.OPEN_TREE_CLONE)


# Rights: CVE-2022-29162, CVE-2022-0492, CVE-2023-25809


def test_nothing_is_inheritable_that_was_not_asked_for(containers: Containers) -> None:
    """CVE-2022-29162: with inheritable capabilities, files of the image hand them on to any user."""
    rights = ["CAP_CHOWN", "CAP_KILL"]

    def shown(**more: object) -> dict[str, str]:
        output = containers.exec(container_id, "grep", "-E", "^Cap", "/proc/self/status", **more)[1]
        return dict(line.split() for line in output.splitlines())

    document = spec("sleep", "1000")
    sets = dict.fromkeys(("bounding", "effective", "permitted"), rights)
    document["process"]["capabilities"] = sets
    container_id, pid = containers.running(document)
    try:
        for more in ({}, {"capabilities": sets}, {"user": {"uid": 1000, "gid": 1000}}):
            found = shown(**more)
            assert found["CapInh:"] == found["CapAmb:"] == "0" * 16
            assert found["CapBnd:"] == f"{0x21:016x}"
        # That it would show: the same, asked for.
        asked = shown(capabilities={**sets, "inheritable": ["CAP_CHOWN"]})
        assert asked["CapInh:"] == f"{1:016x}"
    finally:
        containers.engine.delete(container_id, force=True)
        wait(pid)


@protection
def test_groups_of_the_host_are_out_of_reach(
    containers: Containers, monkeypatch: Patch, protected: bool
) -> None:
    """CVE-2022-0492, CVE-2023-25809: by the top of a tree, a program of the host's is run; by its files, limits go."""
    if not protected:
        whole = CgroupV1.mounts

        def tops(group: CgroupV1) -> tuple[CgroupMount, ...]:
            return tuple(
                CgroupMount(name=each.name, path=os.path.dirname(each.path)) for each in whole(group)
            )

        monkeypatch.setattr(CgroupV1, "mounts", tops)
        monkeypatch.setattr(mounts, "RDONLY", 0)
        attach = mounts._attach_group
        monkeypatch.setattr(
            mounts, "_attach_group", lambda path, target, attributes: attach(path, target, attributes & ~1)
        )
    script = "ls /sys/fs/cgroup/*/release_agent; cd /sys/fs/cgroup/pids; [ -e pids.max ] || cd */.; mkdir x && rmdir x"
    _, output = containers.sh(script)
    assert ("Read-only file system" in output) == protected
    assert any(line.endswith("/release_agent") and "No such" not in line for line in output.splitlines()) == (
        not protected
    )

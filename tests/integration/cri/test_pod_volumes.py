"""What pods mount: directories and files of the host as a kubelet prepares them, ConfigMaps that change, and what a
container may do with them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.client import CriError
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import eventually
from tests.support.atomic_writer import AtomicWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.integration.cri.kubelet import Kubelet, Pod

# What a user of ConfigMaps can expect: the guest's caches are younger than that.
UPDATE_LIMIT_S = 2.0
MIB = 1 << 20
USER, GROUP = 1000, 3000


@pytest.fixture(scope="module")
def machine(kubelet: Kubelet) -> Iterator[Pod]:
    """One virtual machine for all tests here."""
    with kubelet.pod("volumes") as pod:
        yield pod


@pytest.fixture
def pod(machine: Pod) -> Iterator[Pod]:
    """The pod, for containers that live as long as the test."""
    yield from machine.emptied()


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """Takes back what a test did to the host."""
    with ExitStack() as undo:
        yield undo


def volume(host: Path | str, container: str, **fields: object) -> pb.Mount:
    """One entry of a container's mounts."""
    return pb.Mount(host_path=str(host), container_path=container, **fields)  # type: ignore[arg-type]


@contextmanager
def mounted(words: Sequence[str | Path], folder: Path) -> Iterator[Path]:
    """A mount on the host, which the host can always undo at the end: whatever containers use it."""
    subprocess.run(["mount", *words], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def tmpfs(folder: Path, size: str = "16m") -> AbstractContextManager[Path]:
    """A file system in memory on the host, as a kubelet mounts it for an emptyDir of that medium."""
    folder.mkdir(exist_ok=True)
    return mounted(["-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], folder)


def user(uid: int, gid: int = 0, groups: tuple[int, ...] = ()) -> pb.LinuxContainerConfig:
    """Who a container's processes are."""
    return pb.LinuxContainerConfig(
        security_context=pb.LinuxContainerSecurityContext(
            run_as_user=pb.Int64Value(value=uid),
            run_as_group=pb.Int64Value(value=gid),
            supplemental_groups=groups,
        )
    )


def refused(pod: Pod, container: str, script: str) -> str:
    """Standard error of a script that has to fail."""
    done = pod.cri.exec(container, ["sh", "-c", script])
    assert done.exit_code != 0, f"{script} was not refused: {done.stdout.decode()}"
    return done.stderr.decode()


def test_directories_and_single_files(pod: Pod, tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name} of the host")
        (tmp_path / f"{name}-file").write_text(f"{name}-file of the host")
    (tmp_path / "ro" / "below").mkdir()
    with tmpfs(tmp_path / "ro" / "below"):
        container = pod.run(
            "paths",
            mounts=[
                volume(tmp_path / "rw", "/rw"),
                volume(tmp_path / "ro", "/ro", readonly=True),
                volume(tmp_path / "rw-file", "/etc/rw-file"),
                volume(tmp_path / "ro-file", "/etc/ro-file", readonly=True),
            ],
        )
        assert pod.exec(container, "cat", "/rw/file", "/ro/file") == "rw of the hostro of the host"
        assert (
            pod.exec(container, "cat", "/etc/rw-file", "/etc/ro-file")
            == "rw-file of the hostro-file of the host"
        )
        pod.exec(
            container, "sh", "-c", "echo guest > /rw/new; echo guest >> /rw/file; echo guest > /etc/rw-file"
        )
        for path in ("/ro/file", "/ro/new", "/etc/ro-file", "/ro/below/new"):
            assert "Read-only file system" in refused(pod, container, f"echo guest > {path}")
        assert (tmp_path / "rw" / "new").read_text() == "guest\n"
        assert (tmp_path / "rw" / "file").read_text() == "rw of the hostguest\n"
        assert (tmp_path / "rw-file").read_text() == "guest\n"
        (tmp_path / "rw-file").write_text("host again")
        eventually(
            lambda: pod.exec(container, "cat", "/etc/rw-file") == "host again", "the host's change shows"
        )
        pod.cri.stop(container)
        pod.cri.remove(container)
        assert sorted(os.listdir(tmp_path / "rw")) == ["file", "new"]
        assert sorted(os.listdir(tmp_path / "ro")) == ["below", "file"]


@pytest.mark.parametrize("medium", ["disk", "memory"])
def test_containers_share_an_empty_dir(pod: Pod, tmp_path: Path, medium: str) -> None:
    with tmpfs(tmp_path / "empty", "1m") if medium == "memory" else ExitStack():
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "empty").chmod(0o777)
        mounts = [volume(tmp_path / "empty", "/cache")]
        one, two = (pod.run(f"{medium}-{number}", mounts=mounts) for number in (1, 2))
        pod.exec(one, "sh", "-c", "echo from one > /cache/file; mkfifo /cache/fifo; ls /cache")
        assert pod.exec(two, "cat", "/cache/file") == "from one\n"
        pod.exec(one, "sh", "-c", "head -c 500000 /dev/urandom > /cache/data; sync")
        # What a kubelet measures to see who uses too much.
        measured = subprocess.run(
            ["du", "-sk", tmp_path / "empty"], check=True, capture_output=True, text=True
        )
        assert pod.exec(two, "du", "-sk", "/cache").split()[0] == measured.stdout.split()[0]
        assert stat.S_ISFIFO((tmp_path / "empty" / "fifo").stat().st_mode)
        assert pod.exec(two, "stat", "-c", "%F", "/cache/fifo") == "fifo\n"
        if medium == "memory":
            refusal = refused(pod, two, "dd if=/dev/zero of=/cache/large bs=65536 count=32")
            assert "No space left on device" in refusal
        for container in (one, two):
            pod.cri.stop(container)
            pod.cri.remove(container)
        large = ["large"] if medium == "memory" else []
        assert sorted(os.listdir(tmp_path / "empty")) == ["data", "fifo", "file", *large]


def test_volumes_see_later_mounts_of_the_host_only_if_asked(pod: Pod, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with mounted(["--bind", source, source], source), ExitStack() as undo:
        subprocess.run(["mount", "--make-shared", source], check=True)
        (source / "later").mkdir()
        following = volume(source, "/follows", propagation=pb.PROPAGATION_HOST_TO_CONTAINER)
        both_ways = volume(source, "/both", propagation=pb.PROPAGATION_BIDIRECTIONAL)
        may_mount = pb.LinuxContainerConfig(
            security_context=pb.LinuxContainerSecurityContext(
                capabilities=pb.Capability(add_capabilities=["SYS_ADMIN"])
            )
        )
        container = pod.run(
            "propagation", mounts=[following, volume(source, "/private"), both_ways], linux=may_mount
        )
        undo.enter_context(tmpfs(source / "later"))
        (source / "later" / "inside").touch()
        for folder in ("/follows", "/both"):
            eventually(
                lambda: pod.exec(container, "ls", f"{folder}/later") == "inside\n",  # noqa: B023
                "the mount shows",
            )
        assert pod.exec(container, "ls", "/private/later") == ""
        # What the container mounts itself stays where it is, whatever was asked for.
        pod.exec(
            container, "sh", "-c", "mkdir /both/own && mount -t tmpfs none /both/own && touch /both/own/x"
        )
        assert (os.path.ismount(source / "own"), os.listdir(source / "own")) == (False, [])
        # What the guest looks at, the host cannot unmount.
        pod.cri.stop(container)
        pod.cri.remove(container)
        assert os.path.ismount(source / "later")


@pytest.mark.parametrize("count", [1, 100])
def test_config_map_changes_at_once(pod: Pod, tmp_path: Path, count: int) -> None:
    """A reader sees the new version soon, and never parts of two."""
    names = [f"key{number}" for number in range(count)]
    config = AtomicWriter(tmp_path)
    config.write(dict.fromkeys(names, "version 0\n"))
    container = pod.run(f"config-{count}", mounts=[volume(tmp_path, "/config", readonly=True)])
    assert pod.exec(container, "ls", "/config").split() == sorted(names)
    # All files of the version that the link leads to, again and again: one line each time, of what was different.
    look = "cd /config/..data && cat key* | sort -u | tr '\\n' ' ' && echo"
    reader = f"while :; do ({look}); done >> /tmp/seen 2> /dev/null < /dev/null"
    pod.exec(container, "sh", "-c", f"{reader} & until [ -s /tmp/seen ]; do :; done")
    for version in range(1, 4):
        config.write(dict.fromkeys(names, f"version {version}\n"))
        asked = [time.monotonic()]
        new = f"version {version}\n"

        def is_new(asked: list[float] = asked, new: bytes = new.encode()) -> bool:
            asked.append(time.monotonic())
            return pod.cri.exec(container, ["cat", "/config/key0"]).stdout == new

        eventually(is_new, new)
        # The last one who got to see the old version asked soon after the change, however long the answer took.
        assert asked[-2] - asked[0] < UPDATE_LIMIT_S
        assert pod.exec(container, "sh", "-c", "cat /config/key* | sort -u") == new
    seen = set(pod.exec(container, "cat", "/tmp/seen").splitlines())
    assert {"version 0 ", "version 3 "} <= seen <= {"", *(f"version {version} " for version in range(4))}


# Run by the host's Python, which the container sees; busybox has no program that is notified. Prints two
# lines for each change of versions in one of the directories: its name at once, and then what all files say.
NOTIFIED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
folders = {libc.inotify_add_watch(fd, b"/config/%s" % name, 0x80): name for name in map(os.fsencode, sys.argv[1:])}
print("ready", flush=True)
while True:
    data = os.read(fd, 4096)
    while data:
        handle, mask, cookie, size = struct.unpack_from("iIII", data)
        name, data = data[16:16 + size].rstrip(bytes(1)), data[16 + size:]
        folder = b"/config/" + folders[handle]
        if name == b"..data":
            print(folders[handle].decode(), "told", flush=True)
            texts = {open(folder + b"/" + key).read() for key in os.listdir(folder) if key[:2] != b".."}
            print(folders[handle].decode(), *texts, flush=True)
"""


def test_programs_are_notified_of_changes(pod: Pod, tmp_path: Path) -> None:
    """ConfigMaps where a kubelet has them: of 1, 100 and 1,000 files."""
    counts = (1, 100, 1000)
    host = tmp_path / "host"
    for name in ("usr", "config"):
        (host / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (host / name).symlink_to(f"usr/{name}")
    (host / "notified.py").write_text(NOTIFIED)
    volumes = tmp_path / "pods" / "uid" / "volumes" / "kubernetes.io~configmap"
    configs = {count: AtomicWriter(volumes / f"of{count}") for count in counts}

    def write(count: int, text: str) -> None:
        configs[count].write({f"key{number}": text for number in range(count)})

    for count in counts:
        (host / "config" / f"of{count}").mkdir()
        write(count, "old")
    # As for fsGroup.
    os.chown(configs[1].folder, 0, GROUP)
    configs[1].folder.chmod(0o2775)
    mounts = [volume(configs[count].folder, f"/host/config/of{count}", readonly=True) for count in counts]
    container = pod.run(
        "notified",
        ["chroot", "/host", "/usr/bin/python3", "-S", "/notified.py", *(f"of{count}" for count in counts)],
        mounts=[volume(host, "/host", readonly=True), volume("/usr", "/host/usr", readonly=True), *mounts],
    )
    expected = "ready\n"
    eventually(lambda: pod.output("notified") == expected, "the program watches")
    took_s: dict[int, list[float]] = {count: [] for count in counts}
    for text in ("new", "newer", "newest"):
        for count in counts:
            write(count, text)
            written = time.monotonic()
            expected += f"of{count} told\n"
            eventually(lambda: pod.output("notified").startswith(expected), f"{count} files: {expected}")  # noqa: B023
            took_s[count].append(time.monotonic() - written)
            expected += f"of{count} {text}\n"
            eventually(lambda: pod.output("notified") == expected, f"{text!r} in {count} files: {expected}")  # noqa: B023
    # One time out of three at least: what else keeps the machine busy at the others is no concern of the volumes.
    assert max(min(times) for times in took_s.values()) < UPDATE_LIMIT_S, took_s
    assert "Read-only file system" in refused(pod, container, "touch /host/config/of1/new")
    assert pod.exec(container, "stat", "-c", "%g %a", "/host/config/of1") == f"{GROUP} 2775\n"


def test_sub_path_of_a_config_map_survives_changes_and_restarts(
    pod: Pod, tmp_path: Path, undo: ExitStack
) -> None:
    """A kubelet finds the file behind the links, and binds it to a place of its own for the container."""
    config = AtomicWriter(tmp_path / "volume")
    config.write({"key": "first"})
    for attempt, text in enumerate(("first", "second")):
        place = tmp_path / f"sub-path-{attempt}"
        place.touch()
        undo.enter_context(mounted(["--bind", (tmp_path / "volume" / "key").resolve(), place], place))
        container = pod.run("sub-path", attempt=attempt, mounts=[volume(place, "/etc/key", readonly=True)])
        config.write({"key": "second"})
        assert pod.exec(container, "cat", "/etc/key") == text
        pod.cri.stop(container)
        pod.cri.remove(container)


def test_files_of_the_pod(kubelet: Kubelet, pod: Pod, tmp_path: Path) -> None:
    hosts, message = tmp_path / "etc-hosts", tmp_path / "message"
    hosts.write_text("# Kubernetes-managed hosts file.\n127.0.0.1 localhost\n10.1.2.3 volumes\n")
    message.touch(mode=0o666)
    container = pod.run(
        "files",
        [
            "sh",
            "-c",
            "echo it was I > /dev/termination-log; cat /etc/hosts; hostname; cat /etc/hostname; exit 3",
        ],
        mounts=[volume(hosts, "/etc/hosts"), volume(message, "/dev/termination-log")],
    )
    assert pod.finished(container).exit_code == 3
    assert pod.output("files") == f"{hosts.read_text()}volumes\nvolumes\n"
    assert message.read_text() == "it was I\n"


ODD_NAMES = (
    "with space",
    "comma,comma",
    "däta 日本",
    "colon:colon",
    "back\\slash",
    "quote'\"",
    "$HOME",
    "x" * 255,
)


def test_odd_paths_on_both_sides(pod: Pod, tmp_path: Path) -> None:
    mounts = []
    for number, name in enumerate(ODD_NAMES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_text(str(number))
        mounts.append(volume(folder, f"/{number}"))
        mounts.append(volume(folder, f"/odd/{name}"))
    (tmp_path / "link").symlink_to("with space")
    mounts.append(volume(tmp_path / "link", "/link"))
    mounts.append(volume(f"{tmp_path}/comma,comma/", "/slash/"))
    container = pod.run("odd", mounts=mounts)
    paths = [f"/{number}/file" for number in range(len(ODD_NAMES))] + [
        f"/odd/{name}/file" for name in ODD_NAMES
    ]
    numbers = "".join(map(str, range(len(ODD_NAMES))))
    assert pod.exec(container, "cat", *paths, "/link/file", "/slash/file") == f"{numbers}{numbers}01"


def test_many_volumes_in_one_container(pod: Pod, tmp_path: Path) -> None:
    mounts = []
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").write_text(f"{number}\n")
        mounts.append(volume(tmp_path / str(number), f"/volumes/{number}", readonly=number % 2 == 0))
    container = pod.run("many", mounts=mounts)
    seen = pod.exec(container, "sh", "-c", "cat /volumes/*/file | sort -n")
    assert seen == "".join(f"{number}\n" for number in range(40))


def test_what_cannot_be_mounted_is_refused(pod: Pod, tmp_path: Path) -> None:
    """A kubelet makes what is missing; a link to nothing cannot be made."""
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    (tmp_path / "dangling-below").mkdir()
    with pytest.raises(CriError, match="dangling"):
        pod.run("missing", mounts=[volume(tmp_path / "dangling" / "below", "/data")])
    with pytest.raises(CriError, match=r"[Nn]ot a directory"):
        pod.run("not-a-directory", mounts=[volume(tmp_path / "file", "/etc")])


def test_mount_options_hold_in_the_guest(pod: Pod, tmp_path: Path) -> None:
    """What the host mounted without programs, devices and set-uid has none of them in the container."""
    with tmpfs(tmp_path / "plain") as plain:
        subprocess.run(["mount", "-o", "remount,noexec,nosuid,nodev", plain], check=True)
        (plain / "program").write_text("#!/bin/sh\necho ran\n")
        (plain / "program").chmod(0o755)
        os.mknod(plain / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        container = pod.run("options", mounts=[volume(plain, "/plain")])
        for action in ("/plain/program", "echo x > /plain/null"):
            assert "Permission denied" in refused(pod, container, action)
        line = pod.exec(container, "grep", " /plain ", "/proc/mounts")
        assert {"noexec", "nosuid", "nodev", "rw"} <= set(line.split()[3].split(","))


def test_owners_modes_and_attributes(pod: Pod, tmp_path: Path) -> None:
    """As a kubelet prepares a volume for fsGroup: the group owns it, may write, and so new files are the group's."""
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, 0, GROUP)
    shared.chmod(0o2775)
    (shared / "theirs").write_text("x")
    os.chown(shared / "theirs", 12345, 54321)
    (shared / "theirs").chmod(0o640)
    os.setxattr(shared / "theirs", "user.colour", b"blue")
    mounts = [volume(shared, "/shared")]
    container = pod.run("fs-group", mounts=mounts, linux=user(USER, USER, (GROUP,)))
    # The other group is the user's in the image.
    assert pod.exec(container, "id", "-G").split() == [str(USER), "2000", str(GROUP)]
    assert pod.exec(container, "stat", "-c", "%u %g %a", "/shared", "/shared/theirs").splitlines() == [
        f"0 {GROUP} 2775", "12345 54321 640",
    ]  # fmt: skip
    assert "denied" in refused(pod, container, "cat /shared/theirs")
    pod.exec(
        container,
        "sh",
        "-c",
        "umask 002; cd /shared; echo y > mine; mkdir folder; touch folder/below; ln -s a link",
    )
    root = pod.run("root", mounts=mounts)
    pod.exec(root, "sh", "-c", "cd /shared; touch roots; chown 7:8 roots; chmod 4751 roots")
    found = {path.name: path.lstat() for path in shared.rglob("*")}
    owners = {name: (info.st_uid, info.st_gid) for name, info in found.items()}
    assert owners == {
        "theirs": (12345, 54321), "mine": (USER, GROUP), "folder": (USER, GROUP), "below": (USER, GROUP),
        "link": (USER, GROUP), "roots": (7, 8),
    }  # fmt: skip
    assert stat.S_IMODE(found["folder"].st_mode) == 0o2775
    assert stat.S_IMODE(found["mine"].st_mode) == 0o664
    assert stat.S_IMODE(found["roots"].st_mode) == 0o4751
    assert os.getxattr(shared / "theirs", "user.colour") == b"blue"


def test_sockets_in_a_volume(pod: Pod, tmp_path: Path) -> None:
    """A container's socket is one on the host too, and the host's is one in the container; only who is on the same
    side can connect."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "host.sock"))
        container = pod.run("sockets", mounts=[volume(tmp_path, "/run/app")])
        assert pod.exec(container, "stat", "-c", "%F", "/run/app/host.sock") == "socket\n"


def test_larger_shared_memory_of_the_users(pod: Pod, tmp_path: Path) -> None:
    """The usual way to more than 64 MiB of it: an emptyDir in memory on /dev/shm."""
    with tmpfs(tmp_path / "shm", "100m"):
        container = pod.run("shm", mounts=[volume(tmp_path / "shm", "/dev/shm")])
        pod.exec(container, "sh", "-c", "echo here > /dev/shm/file")
        assert (tmp_path / "shm" / "file").read_text() == "here\n"
        # Not df, which takes all that comes from the host for one file system.
        blocks, size = pod.exec(container, "stat", "-f", "-c", "%b %S", "/dev/shm").split()
        assert int(blocks) * int(size) == 100 * MIB


def test_huge_pages_are_the_guests(pod: Pod, tmp_path: Path) -> None:
    """The host's file system of huge pages says of which size they are to be; it has none itself here."""
    source = tmp_path / "pods" / "uid" / "volumes" / "kubernetes.io~empty-dir" / "huge"
    source.mkdir(parents=True)
    with mounted(["-t", "hugetlbfs", "-o", f"pagesize=2M,mode=0775,gid={GROUP}", "nodev", source], source):
        limit = pb.HugepageLimit(page_size="2MB", limit=4 * MIB)
        resources = pb.LinuxContainerResources(hugepage_limits=[limit])
        container = pod.run(
            "huge", mounts=[volume(source, "/huge")], linux=pb.LinuxContainerConfig(resources=resources)
        )
        line = pod.exec(container, "grep", " /huge ", "/proc/mounts").split()
        assert (line[2], "pagesize=2M" in line[3].split(",")) == ("hugetlbfs", True)
        assert pod.exec(container, "stat", "-c", "%g %a", "/huge") == f"{GROUP} 2775\n"
        reserved = pod.exec(container, "grep", "HugePages_Total", "/proc/meminfo").split()[1]
        # containerd passes such limits on only where the host has the controller for them.
        assert reserved in ("0", "2")

"""What a container sees of files: mounts, devices, hidden and protected paths."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from oci_engine.errors import EngineError, SetupFailed
from tests.support.containers import spec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.containers import Containers, Spec


def _options(output: str, point: str) -> set[str]:
    """Of a mount, out of what /proc/self/mounts says."""
    lines = [line.split() for line in output.splitlines()]
    return set(next(fields[3] for fields in reversed(lines) if fields[1] == point).split(","))


def test_mounts_and_their_options(containers: Containers, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)
    (shared / "file").write_text("content\n")
    subprocess.run(["mount", "-t", "tmpfs", "below", str(shared / "below")], check=True)

    def edit(document: Spec) -> None:
        document["mounts"] += [
            {"destination": "/tmp/t", "type": "tmpfs", "source": "mine",
             "options": ["ro", "noexec", "size=1m", "noatime"]},
            {"destination": "/tmp/t/inner", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=700"]},
            {"destination": "/tmp/plain", "type": "bind", "source": str(shared), "options": ["rbind", "ro"]},
            {"destination": "/tmp/deep", "type": "none", "source": str(shared), "options": ["rbind", "rro", "rnoexec"]},
            {"destination": "/tmp/one/file", "source": str(shared / "file"), "options": ["bind", "nosuid"]},
            {"destination": "/tmp/plain", "options": ["remount", "bind", "nodev", "ro"]},
        ]  # fmt: skip
        document["root"]["readonly"] = False
        document["mounts"].insert(0, {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

    try:
        status, output = containers.sh("cat /proc/self/mounts; cat /tmp/one/file >&2", edit)
    finally:
        subprocess.run(["umount", str(shared / "below")], check=True)
    assert status == 0, output
    assert output.endswith("content\n")
    output = output.removesuffix("content\n")
    assert {"ro", "noexec", "noatime", "size=1024k"} <= _options(output, "/tmp/t")
    assert {"rw", "nosuid", "mode=700"} <= _options(output, "/tmp/t/inner")
    assert {"ro", "nodev"} <= _options(output, "/tmp/plain")
    assert "rw" in _options(output, "/tmp/plain/below")
    assert {"ro", "noexec"} <= _options(output, "/tmp/deep")
    assert {"ro", "noexec"} <= _options(output, "/tmp/deep/below")
    assert "nosuid" in _options(output, "/tmp/one/file")


def test_copy_up(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["mounts"].append(
            {"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]}
        )

    status, output = containers.sh("grep -c . /etc/passwd && touch /etc/new && ls /etc", edit)
    assert status == 0, output
    assert {"passwd", "group", "hosts", "new"} <= set(output.split())


def test_long_file_system_parameters(containers: Containers, tmp_path: Path) -> None:
    layers = []
    for number in range(4):
        folder = tmp_path / f"layer-{number}-{'x' * 60}"
        folder.mkdir()
        (folder / f"file{number}").touch()
        layers.append(str(folder))
    document = spec("ls", "/mnt")
    document["mounts"] += [
        {"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/mnt", "type": "overlay", "source": "overlay",
         "options": [f"lowerdir={':'.join(layers)}", "nodev"]},
    ]  # fmt: skip
    document["root"]["path"] = str(_copy_of(containers.rootfs, tmp_path))
    status, output = containers.run(document)
    assert (status, output.split()) == (0, [f"file{number}" for number in range(4)])


def _copy_of(rootfs: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(rootfs), str(target)], check=True)
    return target


def test_file_system_that_does_not_exist(containers: Containers) -> None:
    document = spec("true")
    document["mounts"].append({"destination": "/proc2", "type": "no-such-fs", "source": "x"})
    with pytest.raises(SetupFailed, match=r"mounts\[7\]: mounting no-such-fs at /proc2"):
        containers.create(document)


def test_a_file_is_not_mounted_on_a_directory(containers: Containers, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def edit(document: Spec) -> None:
        document["mounts"].append(
            {"destination": "/etc", "source": str(tmp_path / "file"), "options": ["bind"]}
        )

    with pytest.raises(
        SetupFailed, match=r"mounts\[7\].*/file is not a directory, and /etc .* is one; mount it at"
    ):
        containers.sh("true", edit)


def test_masked_and_readonly_paths(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["maskedPaths"] += ["/etc/passwd", "/home", "/no/such"]
        document["linux"]["readonlyPaths"] += ["/dev/shm", "/no/such"]
        document["root"]["readonly"] = False

    script = (
        "wc -c < /etc/passwd; ls /home | wc -l; touch /home/x; touch /dev/shm/x; echo 1 > /proc/sys/kernel/panic;"
        " cat /proc/timer_list /proc/keys | wc -c"
    )
    _, output = containers.sh(script, edit)
    lines = output.splitlines()
    assert lines[0] == "0"
    assert lines[1] == "0"
    assert output.count("Read-only file system") == 3
    assert lines[-1] == "0"


def test_read_only_root(containers: Containers) -> None:
    assert "Read-only file system" in containers.sh("touch /x")[1]


def test_devices(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["devices"] = [
            {
                "path": "/dev/deep/mine",
                "type": "c",
                "major": 1,
                "minor": 5,
                "fileMode": 0o640,
                "uid": 7,
                "gid": 8,
            },
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o622},
            {"path": "/dev/loose", "type": "c", "major": 1, "minor": 11},
        ]
        document["linux"]["resources"]["devices"].append(
            {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "r"}
        )
        document["process"]["capabilities"] = {
            name: ["CAP_MKNOD", "CAP_DAC_OVERRIDE"] for name in ("bounding", "effective", "permitted")
        }

    script = (
        "ls -ln /dev/deep/mine /dev/pipe; head -c 3 /dev/deep/mine | wc -c; head -c 5 /dev/urandom | wc -c;"
        " head -c 1 /dev/loose; mknod /dev/k c 1 11 && echo made; cat /dev/k; ls -l /dev/ptmx /dev/stdin"
    )
    _, output = containers.sh(script, edit)
    lines = output.splitlines()
    assert lines[0].split()[:6] == ["crw-r-----", "1", "7", "8", "1,", "5"]
    assert lines[1].startswith("prw--w--w-")
    assert lines[2:4] == ["3", "5"]
    # What the group does not allow cannot be opened, whoever made the file.
    assert output.count("Operation not permitted") == 2
    assert "made" in lines
    assert "pts/ptmx" in output
    assert "/proc/self/fd/0" in output


def test_directories_for_mounts_do_not_depend_on_the_callers_umask(
    containers: Containers, own_rootfs: Path
) -> None:
    document = spec("true")
    document["root"]["path"] = str(own_rootfs)
    document["mounts"].append({"destination": "/new/place", "type": "tmpfs", "source": "tmpfs"})
    before = os.umask(0o077)
    try:
        assert containers.run(document)[0] == 0
    finally:
        os.umask(before)
    assert (own_rootfs / "new").stat().st_mode & 0o777 == 0o755


def test_without_pivot_root(containers: Containers) -> None:
    status, output = containers.sh("ls /; cat /proc/self/mounts", no_pivot=True)
    assert status == 0
    assert "bin" in output.split()
    assert "Cap" not in output
    assert sum(line.split()[2] == "proc" for line in output.splitlines() if line.startswith("proc ")) >= 1
    points = [
        line.split()[1] for line in output.splitlines() if line.count(" ") >= 5 and line.split()[2] == "proc"
    ]
    assert set(points) <= {"/proc", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}


@pytest.mark.parametrize(
    ("propagation", "shown"),
    [("shared", "shared:"), ("private", ""), ("rslave", ""), ("unbindable", ""), ("runbindable", "")],
)
def test_propagation_of_the_root(containers: Containers, propagation: str, shown: str) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["rootfsPropagation"] = propagation

    _, output = containers.sh(
        "grep ' / / \\| / ro' /proc/self/mountinfo | head -1; cat /proc/self/mountinfo", edit
    )
    root = next(line for line in output.splitlines() if line.split()[4] == "/")
    assert ("shared:" in root) == bool(shown)


# Attacks that have worked on runtimes.


def test_proc_that_is_a_link(containers: Containers, own_rootfs: Path) -> None:
    (own_rootfs / "proc").rmdir()
    (own_rootfs / "proc").symlink_to("tmp")
    document = spec("true")
    document["root"]["path"] = str(own_rootfs)
    with pytest.raises(SetupFailed, match="/proc is a symbolic link"):
        containers.create(document)


@pytest.mark.parametrize("destination", ["/proc/self", "/proc", "/tmp/link/sys"])
def test_nothing_is_mounted_over_proc(
    containers: Containers, own_rootfs: Path, tmp_path: Path, destination: str
) -> None:
    (own_rootfs / "tmp" / "link").symlink_to("/proc")
    document = spec("true")
    document["root"]["path"] = str(own_rootfs)
    document["mounts"].append(
        {"destination": destination, "type": "bind", "source": str(tmp_path), "options": ["bind"]}
    )
    with pytest.raises(SetupFailed, match="proc"):
        containers.create(document)


def test_what_lxcfs_does_is_allowed(containers: Containers, tmp_path: Path) -> None:
    (tmp_path / "uptime").write_text("1.0 1.0\n")

    def edit(document: Spec) -> None:
        document["mounts"].append(
            {
                "destination": "/proc/uptime",
                "type": "bind",
                "source": str(tmp_path / "uptime"),
                "options": ["bind"],
            }
        )

    assert containers.sh("cat /proc/uptime", edit) == (0, "1.0 1.0\n")


def test_links_in_the_image_do_not_lead_to_the_host(
    containers: Containers, own_rootfs: Path, tmp_path: Path
) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (own_rootfs / "etc" / "resolv.conf").symlink_to(
        "../run/systemd/resolv.conf"
    )  # dangles, as in many images
    (own_rootfs / "data").symlink_to(host)
    (own_rootfs / "up").symlink_to("../../../../../.." + str(host))
    (tmp_path / "source").write_text("mounted\n")

    def edit(document: Spec) -> None:
        document["root"]["path"] = str(own_rootfs)
        document["mounts"] += [
            {
                "destination": f"/{place}",
                "type": "bind",
                "source": str(tmp_path / "source"),
                "options": ["bind"],
            }
            for place in ("etc/resolv.conf", "data/file", "up/other")
        ]
        document["linux"]["devices"] = [{"path": "/data/zero", "type": "c", "major": 1, "minor": 5}]

    status, output = containers.sh("cat /etc/resolv.conf /data/file /up/other; ls /data/zero", edit)
    assert status == 0, output
    assert output.count("mounted") == 3
    assert os.listdir(host) == []
    assert (own_rootfs / str(host).lstrip("/") / "file").exists()


def test_dev_that_is_a_link(containers: Containers, own_rootfs: Path, tmp_path: Path) -> None:
    (own_rootfs / "dev").rmdir()
    (tmp_path / "victim").mkdir()
    (own_rootfs / "dev").symlink_to(tmp_path / "victim")
    document = spec("true")
    document["root"]["path"] = str(own_rootfs)
    document["mounts"] = [each for each in document["mounts"] if not each["destination"].startswith("/dev")]
    assert containers.run(document)[0] == 0
    assert os.listdir(tmp_path / "victim") == []


def test_file_descriptors_of_the_caller_do_not_leak(containers: Containers, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(folder, True)
    high = os.dup2(folder, 200, inheritable=True)
    try:
        status, output = containers.sh("ls -l /proc/self/fd")
        assert status == 0
        assert str(tmp_path) not in output.replace(str(containers.folder / f"{containers.made[0]}.out"), "")
        for fd in (folder, high):
            document = spec("pwd")
            document["process"]["cwd"] = f"/proc/self/fd/{fd}"
            with pytest.raises(EngineError, match=r"process\.cwd"):
                containers.create(document)
    finally:
        os.close(folder)
        os.close(high)

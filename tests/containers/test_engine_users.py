"""User namespaces, and mounts whose ids are mapped anew."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from oci_engine.errors import SetupFailed, SpecError
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.containers import Containers, Spec

MAPPING = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
OTHER = [{"containerID": 0, "hostID": 200_000, "size": 65_536}]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """With a file of root's, one of user 1000's, and another mount inside."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for name, owner in (("roots", 0), ("users", 1000)):
        (folder / name).touch()
        os.chown(folder / name, owner, owner)
    return folder


def bind(source: Path | str, *options: str, destination: str = "/mnt", **more: Any) -> Spec:
    return {"destination": destination, "source": str(source), "options": ["bind", *options], **more}


def test_ids_mapped_anew_without_a_user_namespace(containers: Containers, volume: Path) -> None:
    mapping = [{"containerID": 0, "hostID": 7, "size": 1}, {"containerID": 1000, "hostID": 8, "size": 1}]

    def edit(document: Spec) -> None:
        document["mounts"] += [
            {"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"},
            bind(volume, destination="/mnt/a", uidMappings=mapping, gidMappings=mapping),
            bind(volume, "idmap", "ro", destination="/mnt/b", uidMappings=mapping, gidMappings=mapping),
            bind(volume, destination="/mnt/c"),
        ]
        document["root"]["readonly"] = False
        document["process"]["user"] = {"uid": 7, "gid": 7}

    script = (
        "cd /mnt; stat -c %u:%g a/roots a/users b/roots c/roots; touch a/new && stat -c %u a/new; touch b/new"
    )
    status, output = containers.sh(script, edit)
    assert output.splitlines()[:5] == ["7:7", "8:8", "7:7", "0:0", "7"]
    assert "Read-only" in output
    assert status != 0
    assert (volume / "new").stat().st_uid == 0  # root's on the disk


@pytest.mark.parametrize(("word", "below"), [("idmap", "0"), ("ridmap", "7")])
def test_mounts_below(containers: Containers, volume: Path, word: str, below: str) -> None:
    (volume / "inner").mkdir()
    (volume.parent / "other").mkdir()
    subprocess.run(["mount", "--bind", str(volume.parent / "other"), str(volume / "inner")], check=True)
    mapping = [{"containerID": 0, "hostID": 7, "size": 1}]

    def edit(document: Spec) -> None:
        document["mounts"].append(bind(volume, "rbind", word, uidMappings=mapping, gidMappings=mapping))
        document["root"]["readonly"] = False

    try:
        status, output = containers.sh("stat -c %u /mnt/roots /mnt/inner", edit)
    finally:
        subprocess.run(["umount", str(volume / "inner")], check=True)
    assert (status, output.split()) == (0, ["7", below])


def test_file_system_that_cannot(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["mounts"].append(bind("/sys/fs", uidMappings=MAPPING, gidMappings=MAPPING))

    words = r"mounts\[7\]: ids cannot be mapped anew for /sys/fs: its file system \(sysfs\) cannot"
    with pytest.raises(SetupFailed, match=words):
        containers.sh("true", edit)


@pytest.fixture
def mapped_rootfs(own_rootfs: Path) -> Path:
    subprocess.run(["chown", "-R", "100000:100000", str(own_rootfs)], check=True)
    return own_rootfs


def with_users(rootfs: Path, *args: str, **more: Any) -> Spec:
    document = spec(*args)
    document["root"] |= {"path": str(rootfs), "readonly": False}
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"] |= {"uidMappings": MAPPING, "gidMappings": MAPPING, **more}
    return document


@pytest.fixture
def pod(containers: Containers, mapped_rootfs: Path, volume: Path) -> Iterator[tuple[str, int]]:
    """One that lives on, in a user namespace of its own."""
    container_id, pid = containers.running(with_users(mapped_rootfs, "sleep", "1000"))
    yield container_id, pid
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_the_containers_own_mappings_for_a_mount(
    containers: Containers, mapped_rootfs: Path, volume: Path
) -> None:
    script = "cd /mnt; stat -c %u:%g roots users; touch new; stat -c %u new; id -u"
    document = with_users(mapped_rootfs, "sh", "-c", script)
    document["mounts"].append(bind(volume, "idmap"))
    assert containers.run(document) == (0, "0:0\n1000:1000\n0\n0\n")
    assert (volume / "new").stat().st_uid == 0


def test_without_it_the_files_are_nobodys(containers: Containers, mapped_rootfs: Path, volume: Path) -> None:
    document = with_users(mapped_rootfs, "sh", "-c", "stat -c %u /mnt/roots; touch /mnt/new")
    document["mounts"].append(bind(volume))
    assert containers.run(document) == (0, "65534\n")
    assert (volume / "new").stat().st_uid == 100_000


def joined(rootfs: Path, pid: int, *args: str) -> Spec:
    document = with_users(rootfs, *args)
    for namespace in document["linux"]["namespaces"]:
        if namespace["type"] == "user":
            namespace["path"] = f"/proc/{pid}/ns/user"
    return document


@pytest.mark.parametrize("says_mappings", [True, False])
def test_joined(
    containers: Containers, mapped_rootfs: Path, volume: Path, pod: tuple[str, int], says_mappings: bool
) -> None:
    """As containerd asks for it, with the mappings that the namespace has, and without."""
    script = "readlink /proc/self/ns/user; stat -c %u /mnt/users; echo > /dev/null; id -u; hostname"
    document = joined(mapped_rootfs, pod[1], "sh", "-c", script)
    document["mounts"].append(bind(volume, "idmap"))
    if not says_mappings:
        del document["linux"]["uidMappings"], document["linux"]["gidMappings"]
    status, output = containers.run(document)
    assert status == 0, output
    assert output.split() == [os.readlink(f"/proc/{pod[1]}/ns/user"), "1000", "0", "runk"]


def test_joined_with_other_mappings(
    containers: Containers, mapped_rootfs: Path, pod: tuple[str, int]
) -> None:
    document = joined(mapped_rootfs, pod[1], "true")
    document["linux"]["gidMappings"] = OTHER
    words = "linux.gidMappings: the user namespace that is joined maps 0 100000 65536, not 0 200000 65536"
    with pytest.raises(SpecError, match=words):
        containers.create(document)


def test_one_more_process_is_in_it(containers: Containers, pod: tuple[str, int]) -> None:
    container_id, pid = pod
    status, output = containers.exec(
        container_id, "sh", "-c", "id -u; cat /proc/self/uid_map; echo > /dev/null"
    )
    assert status == 0
    assert output.split() == ["0", "0", "100000", "65536"]
    assert os.stat(f"/proc/{pid}").st_uid == 100_000
    # Rights in it are none over the host's.
    with_rights = {
        name: ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"] for name in ("effective", "permitted", "bounding")
    }
    status, output = containers.exec(
        container_id, "sh", "-c", "mount -t tmpfs x /tmp && echo may; echo 1 > /proc/sys/kernel/panic",
        capabilities=with_rights,
    )  # fmt: skip
    assert output.startswith("may\n")
    assert status != 0


def test_a_device_that_the_host_has_not(containers: Containers, mapped_rootfs: Path, volume: Path) -> None:
    device = {"path": "/dev/null", "type": "c", "major": 1, "minor": 11}
    with pytest.raises(SetupFailed, match=r"device /dev/null: .* is not c 1:11"):
        containers.create(with_users(mapped_rootfs, "true", devices=[device]))

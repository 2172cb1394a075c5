"""Volumes of pods that are disks of the guest: `emptyDir` by `emptydir_mode`, and raw block volumes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.client import CriError
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20


def with_mode(text: str, mode: str) -> str:
    """A configuration in which `emptyDir` volumes are such disks."""
    return (
        re.sub(r"\n\[runtime\]\nemptydir_mode = .*\n", "", text) + f'\n[runtime]\nemptydir_mode = "{mode}"\n'
    )


@pytest.fixture(scope="module")
def machine(kubelet: Kubelet, containerd: Containerd) -> Iterator[Pod]:
    """One virtual machine for all tests here."""
    text = containerd.config.read_text()
    containerd.config.write_text(with_mode(text, "block-plain"))
    try:
        with kubelet.pod("disks") as pod:
            yield pod
    finally:
        containerd.config.write_text(text)


@pytest.fixture
def pod(machine: Pod) -> Iterator[Pod]:
    """The pod, for containers that live as long as the test."""
    yield from machine.emptied()


@pytest.fixture
def empty_dir() -> Iterator[Path]:
    """The directory of an `emptyDir` as a kubelet makes it, for a pod with an fsGroup; on a disk also where /tmp is in
    memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder, "pods", "1-2", "volumes", "kubernetes.io~empty-dir", "cache")
        path.mkdir(parents=True)
        os.chown(path, 0, 3000)
        path.chmod(0o2777)
        yield path


def used_bytes(path: Path) -> int:
    """As a kubelet counts."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


def test_an_empty_dir_on_a_disk(pod: Pod, empty_dir: Path) -> None:
    mounts = [pb.Mount(host_path=str(empty_dir), container_path="/cache")]
    read_only = [pb.Mount(host_path=str(empty_dir), container_path="/cache", readonly=True)]
    one, two = pod.run("one", mounts=mounts), pod.run("two", mounts=read_only)
    assert pod.exec(one, "stat", "-c", "%a %g", "/cache") == "2777 3000\n"
    assert pod.exec(one, "ls", "-A", "/cache") == ""
    (line,) = [line for line in pod.exec(one, "cat", "/proc/mounts").splitlines() if " /cache " in line]
    assert line.split()[2] == "ext4"
    pod.exec(one, "sh", "-c", "echo from one > /cache/file")
    assert pod.exec(two, "cat", "/cache/file") == "from one\n"
    assert pod.cri.exec(two, ["touch", "/cache/new"]).exit_code != 0
    # What the pod uses is what the host sees, and gets back.
    before = used_bytes(empty_dir)
    assert before < 32 * MIB
    pod.exec(one, "sh", "-c", f"head -c {64 * MIB} /dev/urandom > /cache/data; sync")
    assert used_bytes(empty_dir) >= before + 64 * MIB
    pod.exec(one, "sh", "-c", "rm /cache/data; sync")
    eventually(lambda: used_bytes(empty_dir) < before + 16 * MIB, "the host has got back what was deleted")
    # It outlives its containers.
    for container in (one, two):
        pod.cri.stop(container)
        pod.cri.remove(container)
    three = pod.run("three", mounts=mounts)
    assert pod.exec(three, "cat", "/cache/file") == "from one\n"
    assert os.listdir(empty_dir) == ["kata-disk.img"]


def in_file(path: Path, text: bytes) -> bool:
    """Whether it is in there, which is looked for a piece at a time: most of the file are holes."""
    kept = b""
    with path.open("rb", buffering=0) as file:
        while True:
            try:
                file.seek(os.lseek(file.fileno(), file.tell(), os.SEEK_DATA))
            except OSError:
                return False  # the rest is a hole
            piece = file.read(MIB)
            if text in kept + piece:
                return True
            kept = piece[-len(text) :]


def test_an_encrypted_empty_dir(kubelet: Kubelet, containerd: Containerd, empty_dir: Path) -> None:
    """What is written is not on the host in any form that it could read, and stays for the pod's next containers."""
    text = containerd.config.read_text()
    containerd.config.write_text(with_mode(text, "block-encrypted"))
    image = empty_dir / "kata-disk.img"
    mounts = [pb.Mount(host_path=str(empty_dir), container_path="/cache")]
    # Made while it runs: what is told to the container would be in files of the host.
    mark = "a-mark-that-nobody-else-writes-"
    write = f"for i in $(seq 20000); do echo {mark}; done > /cache/file; sync"
    script = f"{write}; md5sum < /cache/file; stat -c '%a %g' /cache"
    try:
        with kubelet.pod("encrypted") as pod:
            one = pod.run("one", mounts=mounts)
            assert pod.exec(one, "ls", "-A", "/cache") == ""
            written = pod.exec(one, "sh", "-c", script)
            assert written.splitlines()[1] == "2777 3000"
            line = next(
                line for line in pod.exec(one, "cat", "/proc/mounts").splitlines() if " /cache " in line
            )
            assert line.startswith("/dev/dm-0 /cache ext4 ")
            assert os.listdir(empty_dir) == [image.name]
            before = used_bytes(empty_dir)
            assert MIB // 2 < before < 48 * MIB
            assert not in_file(image, mark.encode())
            # Neither ext4's mark is where it would be.
            with image.open("rb") as file:
                assert file.read(2048)[1080:1082] != b"\x53\xef"
            pod.exec(one, "sh", "-c", f"head -c {64 * MIB} /dev/urandom > /cache/data; sync")
            assert used_bytes(empty_dir) >= before + 64 * MIB
            pod.exec(one, "sh", "-c", "rm /cache/data; sync")
            eventually(
                lambda: used_bytes(empty_dir) < before + 16 * MIB, "the host has got back what was deleted"
            )
            pod.cri.stop(one)
            pod.cri.remove(one)
            two = pod.run("two", mounts=mounts)
            assert pod.exec(two, "md5sum", "/cache/file").split()[0] == written.split()[0]
            three = pod.run("three", mounts=mounts)
            assert pod.exec(three, "sh", "-c", "wc -l < /cache/file") == "20000\n"
        # Another machine has another key, and starts anew.
        with kubelet.pod("encrypted-again") as pod:
            again = pod.run("again", mounts=mounts)
            assert pod.exec(again, "ls", "-A", "/cache") == ""
    finally:
        containerd.config.write_text(text)


def test_a_part_of_such_a_volume_is_refused(pod: Pod, empty_dir: Path) -> None:
    part = empty_dir.parents[2] / "volume-subpaths" / "cache" / "web" / "0"
    part.mkdir(parents=True)
    with pytest.raises(CriError, match=r"emptyDir cache: .* is to be a part of it \(subPath\)"):
        pod.run("part", mounts=[pb.Mount(host_path=str(part), container_path="/part")])


def test_a_raw_block_volume(pod: Pod, tmp_path: Path) -> None:
    """`volumeDevices` of a pod, with the container's path for it."""
    image = tmp_path / "image"
    image.write_bytes(b"of the host\n".ljust(MIB, b"\0"))
    argv = ["/usr/sbin/losetup", "--find", "--show", str(image)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    try:
        given = pb.Device(container_path="/dev/xvda", host_path=device, permissions="rwm")
        container = pod.run("raw", devices=[given])
        assert pod.exec(container, "head", "-n", "1", "/dev/xvda") == "of the host\n"
        assert pod.exec(container, "stat", "-c", "%F", "/dev/xvda") == "block special file\n"
        pod.exec(container, "sh", "-c", "echo of the pod. | dd of=/dev/xvda conv=notrunc,fsync")
        assert image.read_bytes()[:12] == b"of the pod.\n"
        pod.cri.stop(container)
        pod.cri.remove(container)
    finally:
        subprocess.run(["/usr/sbin/losetup", "-d", device], check=True, timeout=60)

"""Root file systems of containerd's snapshotter `erofs`: every layer is a disk, which the guest mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import grpc
import pytest

from tests.integration.containerd import IMAGE_ARCHIVE
from tests.integration.tasks import Tasks
from tests.integration.test_oom import in_pod

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.integration.containerd import Containerd

MIB = 1 << 20
LAYERS, MANY = "kata-py.local/layers:latest", "kata-py.local/many:latest"
ONE = ["--snapshotter", "erofs"]
LOOK = "ls /data /hidden; cat /data/three; grep ' / ' /proc/mounts"
# What is in the layers, seen from above: "one" is removed, and what was in "hidden" before is not seen.
SEEN = ["/data:", "three", "two", "", "/hidden:", "new", "3"]


def files(*names: str, folders: Sequence[str] = ()) -> bytes:
    """A layer with files that have something in them, and whiteouts, which have nothing."""
    layer = busybox_image.Layer()
    for folder in folders:
        layer.folder(folder)
    for name in names:
        layer.file(name, b"" if "/.wh." in name else b"3\n")
    return layer.content()


def imported(containerd: Containerd, archive: Path, name: str, *layers: bytes) -> None:
    image = busybox_image.Image(name=name, command=("/bin/sh",))
    busybox_image.build(archive, image=image, more=layers)
    # The transfer service of 2.x unpacks for the snapshotters of its configuration only.
    containerd.checked("images", "import", "--local", *ONE, str(archive), timeout_s=120)
    archive.unlink()
    # The snapshotter mounts the layers for the first who wants them, and leaves them mounted.
    containerd.checked("containers", "create", *ONE, name, "first", "true")
    containerd.checked("containers", "rm", "first")


@pytest.fixture(scope="module")
def layered(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """containerd with an image of several layers."""
    server = containerd.server
    if server.version() < (2, 1):
        pytest.skip("containerd has the snapshotter erofs since 2.1")
    if server.snapshotter_status("erofs") != "ok" or not server.makes_erofs():
        pytest.skip(
            "containerd's snapshotter erofs needs erofs in the host's kernel, and mkfs.erofs of erofs-utils 1.7"
        )
    archive = tmp_path_factory.mktemp("layers") / "image.tar"
    below = files("data/one", "data/two", "hidden/old", folders=["data", "hidden"])
    above = files("data/.wh.one", "data/three", "hidden/.wh..wh..opq", "hidden/new", folders=["hidden"])
    imported(containerd, archive, LAYERS, below, above)
    many = [files(f"many/{number:02}", folders=["many"]) for number in range(40)]
    imported(containerd, archive, MANY, *many)
    containerd.checked("images", "import", "--local", *ONE, str(IMAGE_ARCHIVE))
    yield containerd


@contextmanager
def configured(containerd: Containerd, line: str) -> Iterator[None]:
    text = containerd.config.read_text()
    containerd.config.write_text(text.replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{line}"))
    try:
        yield
    finally:
        containerd.config.write_text(text)


@contextmanager
def image_of(containerd: Containerd, name: str) -> Iterator[None]:
    before, containerd.image = containerd.image, name
    try:
        yield
    finally:
        containerd.image = before


def snapshots(containerd: Containerd) -> Path:
    return containerd.server.folder / "root" / "io.containerd.snapshotter.v1.erofs" / "snapshots"


def open_layers(containerd: Containerd) -> dict[str, int]:
    """How many processes have each layer open."""
    found: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            paths = {os.readlink(fd) for fd in folder.iterdir()}
        except OSError:
            continue  # it has ended, or a descriptor has been closed
        for path in paths:
            if path.startswith(str(snapshots(containerd))) and path.endswith("layer.erofs"):
                found[path] = found.get(path, 0) + 1
    return found


def test_one_layer(layered: Containerd) -> None:
    done = layered.run(
        "sh", "-c", "echo here > /new; cat /new; grep ' / ' /proc/mounts", options=["--rm", *ONE]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("here\noverlay / overlay rw,"), done


def test_layers_are_shared_and_what_is_written_stays_with_its_container(layered: Containerd) -> None:
    with image_of(layered, LAYERS):
        one = layered.start("sleep", "1000", options=ONE)
        two = layered.start("sleep", "1000", options=ONE)
    for container in (one, two):
        lines = layered.exec(container, "sh", "-c", LOOK).stdout.splitlines()
        assert lines[:7] == SEEN
        assert lines[7].startswith("overlay / overlay rw,")
    # Two QEMUs have each of them open, and no loop device is in between.
    assert sorted(open_layers(layered).values()) == [2, 2, 2]
    script = "rm /data/two; echo 2 > /data/three; mkdir /made; head -c 20m /dev/urandom > /made/big; ls /data"
    assert layered.exec(one, "sh", "-c", script).stdout == "three\n"
    assert layered.exec(two, "sh", "-c", LOOK).stdout.splitlines()[:7] == SEEN
    layered.remove(two)
    # The snapshot keeps it for the next task of the same container.
    layered.checked("tasks", "rm", "--force", one)
    layered.checked("tasks", "start", *layered.server.fifo_options(), "--detach", one, timeout_s=120)
    done = layered.exec(one, "sh", "-c", "ls /data; cat /data/three; wc -c < /made/big")
    assert done.stdout.split() == ["three", "2", str(20 * MIB)], done
    layered.remove(one)


def test_without_disks_the_host_mounts(layered: Containerd) -> None:
    script = f"{LOOK}; rm /data/two; echo new > /data/new; ls /data"
    with configured(layered, "disable_block_device_use = true"), image_of(layered, LAYERS):
        done = layered.run("sh", "-c", script, options=["--rm", *ONE])
    lines = done.stdout.splitlines()
    assert lines[:7] == SEEN, done
    assert "virtiofs" in lines[7]
    assert lines[8:] == ["new", "three"]


def test_more_layers_than_places(layered: Containerd) -> None:
    with image_of(layered, MANY):
        done = layered.run("true", options=["--rm", *ONE])
        assert done.returncode != 0
        expected = "all 30 places for disks are taken; set block_device_driver to virtio-scsi"
        assert expected in done.stderr, done
        with configured(layered, 'block_device_driver = "virtio-scsi"'):
            done = layered.run("sh", "-c", "ls /many | wc -l", options=["--rm", *ONE])
        assert done.stdout.split() == ["40"], done


def test_containers_of_one_machine_mount_a_layer_once(layered: Containerd) -> None:
    sandbox, other = layered.new_id("s"), layered.new_id()
    with image_of(layered, LAYERS):
        options = ["--detach", *ONE, *in_pod("sandbox", sandbox)]
        layered.checked(*layered.run_arguments(sandbox, ["sleep", "1000"], options=options), timeout_s=120)
        script = "rm /data/two; ls /data; grep -c erofs /proc/mounts"
        done = layered.run(
            "sh", "-c", script, container=other, options=["--rm", *ONE, *in_pod("container", sandbox)]
        )
    assert done.stdout.split() == ["three", "0"], done
    assert sorted(open_layers(layered).values()) == [1, 1, 1]
    assert layered.exec(sandbox, "sh", "-c", LOOK).stdout.splitlines()[:7] == SEEN
    layered.remove(sandbox)


def layer_files(containerd: Containerd) -> list[Path]:
    """Of the image with layers, the uppermost first: it was the first to be unpacked."""
    return [snapshots(containerd) / str(number) / "layer.erofs" for number in (3, 2, 1)]


def merged(containerd: Containerd, folder: Path) -> tuple[str, str, list[str]]:
    """The mount of all layers as one file system, as containerd 2.2 makes one."""
    layers = [str(path) for path in reversed(layer_files(containerd))]
    image = folder / "fsmeta.erofs"
    program = shutil.which("mkfs.erofs", path=f"{containerd.server.programs or ''}:{os.environ['PATH']}")
    assert program is not None
    argv = [program, "--aufs", "--ovlfs-strip=1", "--quiet", str(image), *layers]
    subprocess.run(argv, check=True, timeout=60, capture_output=True)
    return "erofs", str(image), ["ro", "loop", *(f"device={path}" for path in layers)]


@pytest.mark.parametrize("kind", ["layers", "layers by the host", "merged", "merged by the host"])
def test_mounts_that_are_described(layered: Containerd, tmp_path: Path, kind: str) -> None:
    """What containerd 2.2 and later tell a runtime that carries them out itself, here by a client of containerd."""
    by_host = kind.endswith("by the host")
    writable = layered.server.folder / "rwlayer.img"
    below = [("erofs", str(path), ["ro", "loop"]) for path in layer_files(layered)]
    lowerdir = "lowerdir={{ overlay 1 3 }}"
    if kind.startswith("merged"):
        below, lowerdir = [merged(layered, tmp_path)], "lowerdir={{ mount 1 }}"
    places = ["workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", lowerdir]
    made = [f"X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}:0755" for name in ("upper", "work")]
    mkfs = ["X-containerd.mkfs.fs=ext4", f"X-containerd.mkfs.size={64 * MIB}", "rw", "loop"]
    rootfs = [
        ("mkfs/ext4", str(writable), mkfs),
        *below,
        ("format/mkdir/overlay", "overlay", [*made, *places]),
    ]
    container = layered.new_id()
    script = f"{LOOK}; echo new > /data/new; df -m / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"
    create = ["containers", "create", "--runtime", layered.runtime, *ONE, LAYERS, container]
    try:
        with (
            configured(layered, f"disable_block_device_use = {str(by_host).lower()}"),
            Tasks(layered) as tasks,
        ):
            layered.checked(*create, "sh", "-c", script)
            if kind == "merged by the host":
                with pytest.raises(grpc.RpcError, match="in 3 other files, which only a guest puts together"):
                    tasks.run(container, rootfs)
                return
            text = tasks.run(container, rootfs)
        lines = text.splitlines()
        assert lines[:7] == SEEN, text
        assert ("virtiofs" if by_host else "overlay / overlay rw,") in lines[7]
        if not by_host:
            assert 40 < int(lines[8]) < 64
        assert writable.stat().st_size == 64 * MIB
    finally:
        layered.ctr("containers", "rm", container)
        writable.unlink(missing_ok=True)

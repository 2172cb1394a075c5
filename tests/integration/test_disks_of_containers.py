"""Block devices and images of the host as disks of a container's guest: root file systems, volumes, devices."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import IMAGE_ARCHIVE, SHIM, make_ext4, wait_for_end
from tests.support.host import is_running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

MIB = 1 << 20
DIRECT_VOLUMES = Path("/run/kata-containers/shared/direct-volumes")


@pytest.fixture
def images(containerd: Containerd) -> Path:
    """A folder that the host's state is searched for by name."""
    folder = containerd.server.folder / "images"
    folder.mkdir(exist_ok=True)
    return folder


def ext4(folder: Path, name: str, content: str) -> Path:
    tree = folder / f"{name}.d"
    tree.mkdir(exist_ok=True)
    (tree / "file").write_text(content)
    image = folder / f"{name}.img"
    make_ext4(image, tree)
    return image


@contextmanager
def loop(image: Path) -> Iterator[str]:
    argv = ["/usr/sbin/losetup", "--find", "--show", str(image)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["/usr/sbin/losetup", "-d", device], check=True, timeout=60)


@contextmanager
def direct_volume(source: Path, **info: object) -> Iterator[None]:
    folder = DIRECT_VOLUMES / base64.urlsafe_b64encode(str(source).encode()).decode()
    folder.mkdir(parents=True)
    try:
        (folder / "mountInfo.json").write_text(json.dumps(info))
        yield
    finally:
        (folder / "mountInfo.json").unlink()
        folder.rmdir()
        DIRECT_VOLUMES.rmdir()


def content(image: Path, name: str) -> str:
    """Of a file in an image that nobody has mounted."""
    argv = ["/usr/sbin/debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def mount(kind: str, source: object, target: str, options: str) -> list[str]:
    return ["--mount", f"type={kind},src={source},dst={target},options={options}"]


def test_devices_and_volumes(containerd: Containerd, images: Path) -> None:
    """All kinds in one container. What it has written is on the disks when it is gone, also when it was the last."""
    raw, bound, looped, direct = (
        ext4(images, name, f"of {name}\n") for name in ("raw", "bound", "looped", "direct")
    )
    source = images / "direct-volume"
    source.mkdir(exist_ok=True)
    script = """
        cat /bound/file /looped/file /direct/file
        for place in bound looped direct; do echo new in $place > /$place/new; done
        stat -c %g /direct/file
        touch /looped-ro/x 2>/dev/null || echo read-only
        echo overwritten | dd of=$0 conv=notrunc,fsync 2>/dev/null; ls -l $0; ls -l /dev/xda
    """
    with loop(raw) as device, loop(bound) as bound_device, loop(direct) as direct_device:
        info = {
            "volume-type": "block", "device": direct_device, "fstype": "ext4", "metadata": {"fsGroup": "1234"},
            "options": ["noatime"],
        }  # fmt: skip
        with direct_volume(source, **info):
            options = [
                *("--rm", "--device", device),
                *mount("bind", bound_device, "/bound", "rbind:rw"),
                *mount("bind", bound_device, "/dev/xda", "rbind:ro"),
                *mount("ext4", looped, "/looped", "loop:rw"),
                *mount("ext4", ext4(images, "ro", "x"), "/looped-ro", "loop:ro"),
                *mount("bind", source, "/direct", "rbind:rw"),
            ]
            done = containerd.run("sh", "-c", script, device, options=options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == ["of bound", "of looped", "of direct", "1234", "read-only"], done
    assert [line[0] for line in lines[5:]] == ["b", "b"]
    assert raw.read_bytes()[:12] == b"overwritten\n"
    for image in (bound, looped, direct):
        assert content(image, "new") == f"new in {image.stem}\n"


@pytest.mark.one_version
def test_what_a_running_container_has_written_is_on_the_disk_of_a_stopped_sandbox(
    containerd: Containerd, images: Path
) -> None:
    """The host shuts down: it asks the daemon to end, which nobody has told to end its container first."""
    image = ext4(images, "running", "x")
    container = containerd.start("sleep", "1000", options=mount("ext4", image, "/data", "loop:rw"))
    done = containerd.exec(container, "sh", "-c", "echo written > /data/new")
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(f"/run/kata-py/{container}/record.json").read_text())
    status = Path(f"/proc/{record['helpers']['qemu'][0]}/status").read_text()
    daemon = int(status.partition("PPid:")[2].split()[0])
    os.kill(daemon, signal.SIGTERM)
    wait_for_end([daemon], 60)
    assert not is_running(daemon)
    containerd.remove(container)
    assert content(image, "new") == "written\n"


def kata_py(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(SHIM.with_name("kata-py")), *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def volume_of(source: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return kata_py("direct-volume", words[0], "--volume-path", str(source), *words[1:])


@pytest.mark.one_version
@pytest.mark.usefixtures("restored_configuration")
@pytest.mark.parametrize(("fstype", "driver"), [("ext4", "virtio-blk-pci"), ("xfs", "virtio-scsi")])
def test_a_direct_volume_grows_while_it_is_used(
    containerd: Containerd, images: Path, fstype: str, driver: str
) -> None:
    """As a storage driver does it: the device first, then the file system."""
    text = containerd.config.read_text()
    containerd.config.write_text(
        text.replace("[hypervisor.qemu]", f'[hypervisor.qemu]\nblock_device_driver = "{driver}"')
    )
    image, source = images / f"grows-{fstype}.img", images / f"grows-{fstype}"
    source.mkdir(exist_ok=True)
    image.write_bytes(b"")
    os.truncate(image, 320 * MIB)
    subprocess.run([f"/usr/sbin/mkfs.{fstype}", "-q", image], check=True, timeout=60, capture_output=True)
    with (
        loop(image) as device,
        direct_volume(source, **{"volume-type": "block", "device": device, "fstype": fstype}),
    ):
        assert volume_of(source, "stats").stderr == (
            f"kata-py: no container that runs here has the direct volume {source}\n"
        )
        container = containerd.start("sleep", "1000", options=mount("bind", source, "/data", "rbind:rw"))
        done = containerd.exec(
            container, "sh", "-c", "head -c 20m /dev/urandom > /data/file; sync; md5sum /data/file"
        )
        assert done.returncode == 0, done
        before = json.loads(volume_of(source, "stats").stdout)["usage"]
        assert [one["unit"] for one in before] == [1, 2]
        assert 200 * MIB < before[0]["total"] < 320 * MIB
        assert before[0]["used"] >= 20 * MIB
        # Neither without the device, nor smaller.
        refused = volume_of(source, "resize", "--size", str(640 * MIB))
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        os.truncate(image, 640 * MIB)
        subprocess.run(["/usr/sbin/losetup", "-c", device], check=True, timeout=60)
        grown = volume_of(source, "resize", "--size", str(640 * MIB))
        assert (grown.returncode, grown.stderr) == (0, ""), grown
        after = json.loads(volume_of(source, "stats").stdout)["usage"]
        assert after[0]["total"] > 500 * MIB
        shown = containerd.exec(container, "sh", "-c", "md5sum /data/file; df -m /data | tail -n 1")
        assert shown.stdout.splitlines()[0] == done.stdout.strip()
        assert int(shown.stdout.splitlines()[1].split()[1]) > 500
        refused = volume_of(source, "resize", "--size", str(64 * MIB))
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        containerd.remove(container)
    for words, problem in (
        (("--size", "1G"), "--size '1G' is not a number of bytes"),
        (("--size", "-1"), "--size '-1' is not a number of bytes"),
    ):
        assert volume_of(source, "resize", *words).stderr == f"kata-py: {problem}\n"


@pytest.mark.one_version
@pytest.mark.usefixtures("restored_configuration")
def test_swap(containerd: Containerd, images: Path) -> None:
    """A container that writes more than its memory limit to memory lives on swap, and nothing of that stays."""
    folder = images / "swap"
    text = containerd.config.read_text()
    swap = f'enable_guest_swap = true\nguest_swap_path = "{folder}"'
    containerd.config.write_text(text.replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{swap}"))
    annotation = "io.katacontainers.container.resource"
    options = [
        *("--rm", "--memory-limit", str(64 * MIB), "--annotation", f"{annotation}.swappiness=60"),
        *("--annotation", f"{annotation}.swap_in_bytes={192 * MIB}"),
        *("--mount", "type=tmpfs,src=tmpfs,dst=/memory,options=size=150m"),
        *("--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"),
    ]
    script = """
        grep SwapTotal /proc/meminfo; cat /sys/fs/cgroup/memory.swap.max
        head -c 90m /dev/urandom | tee /memory/file | md5sum
        cat /sys/fs/cgroup/memory.swap.current; md5sum < /memory/file
    """
    done = containerd.run("sh", "-c", script, options=options)
    assert done.returncode == 0, done
    total, most, written, current, found = done.stdout.splitlines()
    assert total.split() == ["SwapTotal:", str(128 * 1024), "kB"]
    assert int(most) == 128 * MIB
    assert int(current) > 20 * MIB
    assert found == written
    assert list(folder.iterdir()) == []


@pytest.mark.one_version
@pytest.mark.usefixtures("restored_configuration")
def test_without_disks_the_host_mounts(containerd: Containerd, images: Path) -> None:
    text = containerd.config.read_text()
    containerd.config.write_text(
        text.replace("[hypervisor.qemu]", "[hypervisor.qemu]\ndisable_block_device_use = true")
    )
    image = ext4(images, "hosts", "of the host\n")
    script = "cat /data/file; echo new > /data/new; grep ' /data ' /proc/mounts"
    done = containerd.run("sh", "-c", script, options=["--rm", *mount("ext4", image, "/data", "loop:rw")])
    assert done.stdout.startswith("of the host\n"), done
    assert "virtiofs" in done.stdout
    assert content(image, "new") == "new\n"
    with loop(image) as device:
        done = containerd.run("true", options=["--rm", "--device", device])
        assert f"device {device} cannot reach the guest: disable_block_device_use is set" in done.stderr


@pytest.mark.one_version
def test_what_cannot_be_a_disk_is_told_and_leaves_nothing(containerd: Containerd, images: Path) -> None:
    garbage = images / "garbage.img"
    garbage.write_bytes(bytes(1 << 20))
    done = containerd.run("true", options=["--rm", *mount("ext4", garbage, "/data", "loop:rw")])
    assert done.returncode != 0
    expected = rf"{garbage}: disk /dev/vd\w+ cannot be mounted as ext4: Invalid argument; see that it has such a file"
    assert re.search(expected, done.stderr), done.stderr
    source = images / "wrong-volume"
    source.mkdir(exist_ok=True)
    options = ["--rm", *mount("bind", source, "/data", "rbind:rw")]
    with direct_volume(source, **{"volume-type": "spdkvol", "device": "/dev/x", "fstype": "ext4"}):
        assert (
            "volume-type 'spdkvol'; known are block devices" in containerd.run("true", options=options).stderr
        )
    with direct_volume(source, **{"volume-type": "block", "device": "/dev/none", "fstype": "ext4"}):
        done = containerd.run("true", options=options)
        assert (
            "/dev/none cannot be a disk of the guest: cannot mount: No such file or directory" in done.stderr
        )


@pytest.mark.one_version
def test_a_privileged_container_gets_no_device_of_the_host(containerd: Containerd, images: Path) -> None:
    """With all of the host's in its specification it runs, and has those of the guest."""
    image = ext4(images, "given", "x")
    with loop(image) as device:
        done = containerd.run("sh", "-c", "ls -l /dev/kmsg; ls /dev", options=["--rm", "--privileged"])
        assert done.returncode == 0, done.stderr
        assert Path(device).name not in done.stdout.split()


def test_root_file_systems_on_images(containerd: Containerd) -> None:
    """The snapshotter has each snapshot in an image with a file system; the guest mounts it, and the host does not."""
    if containerd.server.version() < (1, 7):
        pytest.skip("containerd 1.6 has no snapshotter with images: blockfile came with 1.7")
    server = containerd.server
    assert server.snapshotter_status("blockfile") == "ok"
    # The transfer service of 2.x unpacks for the snapshotters of its configuration only.
    local = ["--local"] if server.generation() >= 2 else []
    containerd.checked("images", "import", *local, "--snapshotter", "blockfile", str(IMAGE_ARCHIVE))
    script = "grep ' / ' /proc/mounts; echo here > /new; cat /new; cat /proc/uptime > /dev/null"
    options = ["--rm", "--snapshotter", "blockfile"]
    done = containerd.run("sh", "-c", script, options=options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].startswith("/dev/vd")
    assert done.stdout.split()[2] == "ext4"
    assert done.stdout.endswith("here\n")
    done = containerd.run(
        "sh", "-c", "test -e /new || grep ' / ' /proc/mounts", options=[*options, "--read-only"]
    )
    assert " ext4 ro," in done.stdout, done

"""Real containers on this host for tests: bundles, one call from specification to output, and proof of no leftovers."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import tarfile
import termios
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import busybox_image

from oci_engine.container import Engine
from oci_engine.options import CreateOptions, ExecOptions, Streams
from runk.default_spec import default_spec
from tests.support import host

if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_engine.cgroups.group import Cgroup

BUSYBOX = Path("/bin/busybox")
Spec = dict[str, Any]


def unpack_root(folder: Path) -> Path:
    """A root file system of busybox alone."""
    layer = busybox_image.root_layer(BUSYBOX, busybox_image.applets(BUSYBOX))
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        archive.extractall(folder)
    return folder


def spec(*args: str) -> Spec:
    """The default one, without a terminal, running this."""
    document: Spec = default_spec()
    document["process"] |= {"terminal": False, "args": list(args)}
    return document


class Containers:
    """The containers of one test. Their ids, and so their control groups, are nobody else's."""

    def __init__(self, folder: Path, rootfs: Path, name: str) -> None:
        self.folder = folder
        self.rootfs = rootfs
        self.name = name
        self.engine = Engine(str(folder / "state"))
        self.made: list[str] = []

    def bundle(self, document: Spec, container_id: str = "") -> tuple[str, Path]:
        """Writes it; the id is the test's own with a number."""
        container_id = container_id or f"{self.name}-{len(self.made)}"
        self.made.append(container_id)
        bundle = self.folder / f"bundle-{container_id}"
        bundle.mkdir()
        if document["root"]["path"] == "rootfs":
            document["root"]["path"] = str(self.rootfs)
        document["linux"].setdefault("cgroupsPath", f"/{container_id}")
        (bundle / "config.json").write_text(json.dumps(document))
        return container_id, bundle

    def create(self, document: Spec, **options: Any) -> tuple[str, int, Path]:
        """Returns id, pid and the file with the output."""
        container_id, bundle = self.bundle(document)
        output = self.folder / f"{container_id}.out"
        streams = options.pop("streams", None)
        with open(output, "wb") as file, open("/dev/null", "rb") as null:
            streams = streams or Streams(stdio=(null.fileno(), file.fileno(), file.fileno()))
            pid = self.engine.create(container_id, str(bundle), CreateOptions(streams=streams, **options))
        return container_id, pid, output

    def run(self, document: Spec, **options: Any) -> tuple[int, str]:
        """From creation to deletion: exit status and output."""
        container_id, pid, output = self.create(document, **options)
        self.engine.start(container_id)
        status = wait(pid)
        self.engine.delete(container_id)
        return status, output.read_text()

    def sh(self, script: str, edit: Callable[[Spec], None] | None = None, **options: Any) -> tuple[int, str]:
        """A shell script, in a specification that `edit` may change."""
        document = spec("sh", "-c", script)
        if edit is not None:
            edit(document)
        return self.run(document, **options)

    def running(self, document: Spec | None = None) -> tuple[str, int]:
        """One that sleeps."""
        container_id, pid, _ = self.create(document or spec("sleep", "1000"))
        self.engine.start(container_id)
        return container_id, pid

    def exec(self, container_id: str, *args: str, **process: Any) -> tuple[int, str]:
        """One more process: exit status and output."""
        output = self.folder / f"{container_id}.exec"
        document = {"args": list(args), "cwd": "/", "env": ["PATH=/bin"], **process}
        with open(output, "wb") as file, open("/dev/null", "rb") as null:
            streams = Streams(stdio=(null.fileno(), file.fileno(), file.fileno()))
            pid, _ = self.engine.exec(container_id, document, ExecOptions(streams=streams))
        return wait(pid), output.read_text()

    def leftovers(self) -> list[str]:
        """State, control groups and mounts of the test's containers; processes are the caller's to count."""
        lines = [f"state {each}" for each in self.engine.ids()]
        for container_id in self.made:
            lines += [f"group {path}" for path in groups_named(container_id)]
        return lines + [f"mount {point}" for point in host.mounts_below(self.folder)]

    def clear(self) -> None:
        """After a failed test."""
        for container_id in self.engine.ids():
            with suppress(Exception):
                self.engine.delete(container_id, force=True)


def groups_named(container_id: str) -> list[Path]:
    """In every hierarchy of version 1, or in the one of version 2."""
    top = Path("/sys/fs/cgroup")
    return [path for path in (top / container_id, *top.glob(f"*/{container_id}")) if path.is_dir()]


def has_systemd() -> bool:
    """Whether this host's groups, of version 2 alone, are systemd's to give."""
    return Path("/proc/1/comm").read_text() == "systemd\n" and Path("/sys/fs/cgroup/cgroup.procs").exists()


#: Who makes groups for callers of runtimes here.
MANAGERS = ("cgroupfs", "systemd") if has_systemd() else ("cgroupfs",)


def groups_below(name: str) -> list[Path]:
    """Groups of this name in every tree, with all below them; those above come first."""
    return [path for top in groups_named(name) for path in sorted({top, *top.rglob("*/")}) if path.is_dir()]


def written(groups: list[Path], *files: str) -> set[str]:
    """What these files of the groups say, where they are."""
    found = (group / file for group in groups for file in files)
    return {path.read_text().strip() for path in found if path.exists()}


def wait(pid: int) -> int:
    """Exit status of a child, as shells have it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def remove_group(group: Cgroup) -> None:
    group.kill()
    group.remove()


def in_terminal(
    command: list[str], keys: bytes, environment: dict[str, str] | None = None, *, asked: bytes = b""
) -> tuple[int, str]:
    """Run a program in a terminal of 50 rows and 120 columns, and type when it has said what is `asked`.

    Returns its exit status and all that it said.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    )
    os.close(slave)
    said = b""
    while True:
        if keys and asked in said:
            os.write(master, keys)
            keys = b""
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        said += data
    os.close(master)
    return process.wait(60), said.decode()

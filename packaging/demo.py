"""`make run`, `make stop` and the first half of `make clean`: the private containerd of a source checkout.

The first run starts containerd and imports the image; later ones find both and only start the container. What is
kept lies below build/containerd, or below /run when the checkout's path is too long for Unix sockets. Limited to
the standard library, so that stopping works whatever became of the virtual environment.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import dev_config
import sandboxes
from private_containerd import ContainerdError, PrivateContainerd, choose_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
IMAGE = BUILD / "busybox.tar"
CONFIG = BUILD / "configuration.toml"
RUNTIME = "io.containerd.kata-py.v2"
# Folders that containerd, ctr and shims make wherever they run; ours to remove only if we were the first.
RUN_CONTAINERD = Path("/run/containerd")
DEMO = ("uname", "-a")
BOOT_LIMIT_S = 600.0
# The moments that the shim reports for a start (timings.json, and `sandbox_up` in its log), for readers.
MOMENTS = {
    "spawned": "programs started",
    "qmp_ready": "QEMU answers",
    "agent": "guest booted, agent answers",
    "sandbox": "sandbox ready",
}


def containerd() -> PrivateContainerd:
    """The containerd of this checkout, running or not."""
    name = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:12]
    return PrivateContainerd(
        folder=choose_folder(BUILD / "containerd", Path("/run/kata-py-dev") / name),
        search_path=(BUILD / "bin",),
        environment={"KATA_CONF_FILE": str(CONFIG)},
    )


@contextmanager
def phase(times: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long its block took."""
    started = time.monotonic()
    yield
    times[name] = time.monotonic() - started


def write_if_changed(path: Path, text: str, mode: int = 0o644) -> None:
    """Leaves an equal file alone, so that nothing made from it looks outdated."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    path.chmod(mode)


def write_ctr(server: PrivateContainerd) -> Path:
    """A `ctr` that talks to the private containerd, for trying things by hand."""
    path = BUILD / "ctr"
    words = shlex.join(["env", f"CONTAINERD_ADDRESS={server.socket}", server.program("ctr")])
    write_if_changed(path, f'#!/bin/sh\nexec {words} "$@"\n', 0o755)
    return path


def start(server: PrivateContainerd) -> str:
    """Starts containerd if needed; says what was done."""
    created = server.folder / "created-run-containerd"
    first = not RUN_CONTAINERD.exists()
    if not server.start():
        return f"already running (process {server.pid()})"
    if first:
        created.touch()
    return f"started (process {server.pid()})"


def import_image(server: PrivateContainerd) -> tuple[str, str]:
    """Imports the image unless this archive is there already; returns what was done, and the snapshotter."""
    mark = server.folder / "imported"
    state = IMAGE.stat()
    current = f"{state.st_mtime_ns} {state.st_size}"
    if mark.exists():
        known, _, snapshotter = mark.read_text().partition("\n")
        if known == current:
            return "already imported", snapshotter
    snapshotter = server.snapshotter()
    server.import_image(IMAGE, snapshotter=snapshotter)
    mark.write_text(f"{current}\n{snapshotter}")
    return f"imported for {snapshotter}", snapshotter


def moments(log: str) -> dict[str, float]:
    """When the sandbox that was started last reached what, in seconds since its start, in order of time."""
    for line in reversed(log.splitlines()):
        if " msg=sandbox_up " in line:
            words = dict(word.partition("=")[::2] for word in line.split())
            # Those of the guest come from another clock.
            times = {name: float(words[f"{name}_s"]) for name in MOMENTS if f"{name}_s" in words}
            return dict(sorted(times.items(), key=lambda item: item[1]))
    return {}


def run() -> None:
    """Runs one container and shows what it said beside what the host says."""
    times: dict[str, float] = {}
    write_if_changed(CONFIG, dev_config.render(BUILD / "guest", writer="make run"))
    server = containerd()
    with phase(times, "containerd"):
        containerd_note = start(server)
    with phase(times, "image"):
        image_note, snapshotter = import_image(server)
    ctr = write_ctr(server)
    container = f"demo-{os.getpid()}"
    command = [
        *("run", "--rm", *server.fifo_options(), "--snapshotter", snapshotter, "--runtime", RUNTIME),
        *(busybox_image.NAME, container, *DEMO),
    ]
    print(f"Starting a container in a microVM of its own: {' '.join(DEMO)}", flush=True)
    log_size = server.log_size()
    with phase(times, "container"):
        done = server.ctr(*command, timeout_s=BOOT_LIMIT_S)
    if done.returncode != 0:
        problem = f"the container failed with status {done.returncode}: {done.stderr.strip()}"
        raise server.error(problem, since=log_size)
    host = " ".join(os.uname())
    print(f"\n  host       {host}\n  container  {done.stdout.strip()}\n")
    notes = {
        "containerd": containerd_note,
        "image": image_note,
        "container": "VM booted, command run, VM gone",
    }
    for name, note in notes.items():
        print(f"  {name:<10} {times[name]:6.2f} s  {note}")
    for name, at in moments(server.log_since(log_size)).items():
        print(f"  {'':<10} {at:6.2f} s  after the shim's start: {MOMENTS[name]}")
    relative = os.path.relpath(ctr)
    print(f"\nA shell of your own:  {relative} run --rm -t --runtime {RUNTIME} {busybox_image.NAME} mine sh")
    print("End it all:           make stop")


def stop() -> None:
    """Ends the private containerd and everything that runs under it."""
    server = containerd()
    pid = server.pid()
    print(
        f"stop: ending containerd (process {pid}) and its containers" if pid else "stop: nothing is running"
    )
    server.stop()
    if left := sandboxes.clean_up(server, BUILD / "bin" / "containerd-shim-kata-py-v2"):
        print(f"stop: cleaned up after sandboxes that had crashed: {', '.join(left)}")


def clean() -> None:
    """Stops, then removes what lies outside build/ or needs unmounting first."""
    stop()
    server = containerd()
    created = (server.folder / "created-run-containerd").exists()
    server.remove()
    with suppress(OSError):  # only when it was the long-path fallback and is empty now
        Path("/run/kata-py-dev").rmdir()
    if created:
        for folder in (RUN_CONTAINERD / "s", RUN_CONTAINERD / "fifo", RUN_CONTAINERD):
            with suppress(OSError):  # missing, or somebody else's things are in it: either way not ours
                folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description="The private containerd of this checkout.")
    parser.add_argument("verb", choices=("run", "stop", "clean"))
    verb = parser.parse_args().verb
    try:
        {"run": run, "stop": stop, "clean": clean}[verb]()
    except (ContainerdError, subprocess.TimeoutExpired) as error:
        sys.exit(
            f"{verb}: {error}\n{verb}: `build/bin/kata-py check` tells whether this host lacks something"
        )


if __name__ == "__main__":
    main()

"""A whole Debian in a QEMU, with this host's files: systemd as PID 1, cgroup v2 alone, Debian's own kernel.

The machine has this host's root file system, shared read-only, and what it writes stays in its memory. Its processor is
emulated and has SVM, so that it has KVM as well. It has one service, which runs what it is asked for; see
`tests.node.servant`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import debian_node

from config.validate import VIRTIOFSD_PLACES
from hypervisor.sockets import unix_listener
from hypervisor.spec import Share
from hypervisor.virtiofsd import daemon_argv, flavour_of
from tests.node import servant

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = REPOSITORY / "build" / "node"
START_TIMEOUT_S, BOOT_TIMEOUT_S = 20.0, 240.0
MEMORY = "6G"
#: How often the machine is booted for one request. Its kernel changes its code while it runs, and the emulator's
#: processors, a thread each, once in many minutes execute half of such a change.
BOOTS = 3
PANIC = "Kernel panic"
#: Services that take long and that nothing here needs: what would be tidied up is this host's, seen from inside.
MASKED = (
    *("systemd-tmpfiles-setup", "systemd-tmpfiles-setup-dev", "systemd-timesyncd", "systemd-update-utmp"),
    *(
        "systemd-journal-flush",
        "systemd-random-seed",
        "systemd-sysusers",
        "systemd-binfmt",
        "kmod-static-nodes",
    ),
)
#: Mounts the root file system once more, without what is mounted below it, for the programs that follow.
EXPORT = """\
mount --bind / "$1"
for place in $2; do mount --bind "$place" "$1$place"; done
for place in / $2; do mount -o remount,bind,ro "$1$place"; done
shift 2
exec "$@"
"""


class NodeError(Exception):
    """The machine did not do what it was asked for; the text ends with the last lines of its console."""


class NodePanicked(NodeError):
    """The machine's own kernel gave up."""


class Done(NamedTuple):
    """A program's end."""

    status: int
    output: str


class Node:
    """The machine, running after `boot`. Everything of it is below the folder, and ends with `end`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo = ExitStack()
        self._line: socket.socket
        self._console = folder / "console"

    def boot(self) -> None:
        """Start it, in the place of one that has ended. Raises NodeError."""
        self.end()
        folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory(dir=self._folder)))
        with ExitStack() as undo:
            listener = undo.enter_context(unix_listener(folder / "fs"))
            line = undo.enter_context(unix_listener(folder / "line"))
            sharing = _sharing(folder, listener.fileno())
            _spawn(self._undo, sharing, listener.fileno(), output=self._folder / "virtiofsd")
            _spawn(self._undo, _qemu(folder, self._console), output=self._folder / "qemu")
            line.settimeout(START_TIMEOUT_S)
            try:
                self._line, _ = line.accept()
            except TimeoutError:
                raise NodeError(f"QEMU does not start: {(self._folder / 'qemu').read_text()}") from None
            self._undo.enter_context(self._line)
            self.finish(BOOT_TIMEOUT_S)

    def end(self) -> None:
        """Harmless when it is not running."""
        self._undo.close()

    def run(
        self,
        *argv: str | Path,
        environment: Mapping[str, str] | None = None,
        limit_s: int = 300,
        show: bool = False,
    ) -> Done:
        """Run a program in the checkout, to its end; from its beginning in a new machine when this one's kernel panics.
        With `show`, what it writes is also written here as it comes.

        Raises NodeError when the machine does not answer.
        """
        own = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        request = {
            "argv": [str(word) for word in argv],
            "folder": str(REPOSITORY),
            "environment": {**own, "HOME": "/root", "LANG": "C.UTF-8", **(environment or {})},
            "limit_s": limit_s,
        }
        for _ in range(BOOTS - 1):
            with suppress(NodePanicked):
                return self._ask(request, limit_s + 60, show=show)
            self.boot()
        return self._ask(request, limit_s + 60, show=show)

    def _ask(self, request: Mapping[str, object], limit_s: float, *, show: bool) -> Done:
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n")
        except OSError as err:
            raise self._error(f"the node's line broke: {err}") from err
        return self.finish(limit_s, show=show)

    def finish(self, limit_s: float, *, show: bool = False) -> Done:
        """Wait for the end of what runs. Raises NodeError."""
        deadline = time.monotonic() + limit_s
        output = bytearray()
        while True:
            kind, value = servant.PIECE.unpack(self._read(servant.PIECE.size, deadline))
            if kind == servant.END:
                return Done(value, output.decode(errors="replace"))
            data = self._read(value, deadline)
            output += data
            if show:
                sys.stdout.write(data.decode(errors="replace"))
                sys.stdout.flush()

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self._line.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                more = self._line.recv(size - len(data))
            except TimeoutError:
                raise self._error("the node does not answer") from None
            except OSError as err:
                raise self._error(f"the node's line broke: {err}") from err
            if not more:
                raise self._error("the node has ended")
            data += more
        return data

    def _error(self, what: str) -> NodeError:
        said = self._console.read_text(errors="replace").splitlines() if self._console.exists() else []
        kind = NodePanicked if any(PANIC in line for line in said) else NodeError
        return kind("\n".join([f"{what}; its console said last:", *said[-20:]]))


@contextmanager
def booted(folder: Path) -> Iterator[Node]:
    """The machine for the length of the block, up when this yields. Raises NodeError."""
    node = Node(folder)
    try:
        node.boot()
        yield node
    finally:
        node.end()


def _spawn(undo: ExitStack, argv: Sequence[str], *fds: int, output: Path) -> subprocess.Popen[bytes]:
    """Start a program that ends with the block, and with this process whatever ends that."""
    with output.open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
        )

    def end() -> None:
        process.kill()
        process.wait()

    undo.callback(end)
    return process


def _sharing(folder: Path, listener: int) -> list[str]:
    """A virtiofsd for this host's root file system in a mount namespace of its own, in which that is read-only."""
    exported = folder / "exported"
    exported.mkdir()
    share = Share(tag=debian_node.TAG, directory=exported, daemon=_virtiofsd(), cache="always")
    daemon = daemon_argv(asyncio.run(flavour_of(share.daemon)), share, listener)
    others = {_mount_point(path) for path in (REPOSITORY, Path(sys.prefix).resolve())} - {"/"}
    script = ["sh", "-e", "-c", EXPORT, "sh", str(exported), " ".join(sorted(others))]
    return ["unshare", "--mount", "--propagation", "private", *script, *daemon]


def _virtiofsd() -> Path:
    for place in map(Path, VIRTIOFSD_PLACES):
        if place.exists():
            return place
    raise NodeError(f"no virtiofsd at {' or '.join(VIRTIOFSD_PLACES)}; packaging/setup.sh installs it")


def _mount_point(path: Path) -> str:
    return str(next(each for each in (path, *path.parents) if each.is_mount()))


def _qemu(folder: Path, console: Path) -> list[str]:
    masks = [f"systemd.mask={name}.service" for name in MASKED]
    kernel = [
        "console=ttyS0",
        "panic=-1",
        "oops=panic",
        "mitigations=off",
        "tsc=reliable",
        "no_timer_check",
        "cryptomgr.notests",
    ]
    unit = ["systemd.unit=node.target", "systemd.show_status=0", f"servant={servant.__file__}"]
    unit.append(f"checkout={REPOSITORY}")
    return [
        "qemu-system-x86_64",
        *("-M", "q35,memory-backend=memory", "-accel", "tcg,thread=multi,tb-size=1024"),
        *("-cpu", "max,la57=off", "-smp", "2", "-m", MEMORY),
        *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(IMAGE / "vmlinux"), "-initrd", str(IMAGE / "initrd.img")),
        *("-append", " ".join([*kernel, *masks, *unit])),
        *("-serial", f"file:{console}"),
        *("-chardev", f"socket,id=fs,path={folder / 'fs'}"),
        *("-device", f"vhost-user-fs-pci,chardev=fs,tag={debian_node.TAG},queue-size=1024"),
        *("-chardev", f"socket,id=line,path={folder / 'line'}", "-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,chardev=line,name={servant.NAME}"),
        *("-device", "virtio-rng-pci"),
    ]

"""QEMU's storage daemon as the program that serves a disk (vhost-user-blk)."""

from __future__ import annotations

import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DAEMON = Path(shutil.which("qemu-storage-daemon") or "/nonexistent")
_END_S = 60


@contextmanager
def served(image: Path, path: Path) -> Iterator[None]:
    """The image as a disk on the socket at `path`, from the first moment: the socket is ours, and inherited."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        argv = [
            str(DAEMON),
            *("--blockdev", f"driver=file,node-name=image,filename={image}"),
            "--export",
            f"type=vhost-user-blk,id=disk,node-name=image,addr.type=fd,addr.str={fd},writable=on",
        ]
        daemon = subprocess.Popen(argv, pass_fds=[fd])
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait(_END_S)
        path.unlink(missing_ok=True)

"""A stand-in for the shim's program, so that containerd finds its task again when kata-py has been removed or moved.

containerd (1.6 to 2.x) notes the program's path in the bundle, in the file `shim-binary-path`. When it starts again it
looks first whether that program exists; if not, it deletes the bundle and forgets the task, without ever trying to
reach the running shim. So the path is made one that exists for exactly as long as the task: a launcher in the task's
working folder, the bundle's link `work`, which containerd removes together with the bundle. The bundle itself would
not do, since /run is often mounted `noexec`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog

log = structlog.get_logger()

NAME = "containerd-shim-kata-py-v2"
_NOTE = "shim-binary-path"
_SOURCE = """\
#!{python} -IS
import sys

sys.path.append({library!r})
try:
    from shim.cli import main
except ImportError as err:
    sys.exit(f"kata-py is no longer in {{sys.path[-1]}}, so nothing was cleaned up: {{err}}")
main()
"""


def put_in_place(bundle: Path) -> None:
    """Write the stand-in and its path. Without one the task runs as well, so a failure is only a warning.

    Bundles of others than containerd have no working folder, and nobody would look for a program.
    """
    work = bundle / "work"
    if not work.is_symlink():
        return
    try:
        program = work.resolve(strict=True) / NAME
        # Not the environment's link, which may be removed as well; `-S` looks at no environment anyway.
        python = Path(sys.executable).resolve()
        library = str(Path(__file__).resolve().parent.parent)
        _replace(program, _SOURCE.format(python=python, library=library), mode=0o700)
        _replace(bundle / _NOTE, str(program), mode=0o600)
    except OSError as err:
        log.warning("stand_in_not_written", bundle=str(bundle), error=str(err))


def _replace(path: Path, text: str, *, mode: int) -> None:
    """Write atomically: containerd may be starting, and reading, at this moment."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.chmod(mode)
    os.rename(fresh, path)

"""Writes the programs that start kata-py: the shim that containerd calls, the command line tool, and `runk`.

containerd runs the shim two or three times for each container, so its start is paid for often. The launcher
is a script whose interpreter runs isolated (`-I`: no PYTHON* variables, never imports from the working
folder, which containerd sets to the bundle) and without `site` (`-S`: no `.pth` files, no look at user
folders); the few folders it does need are written into it. The others use the same form.

Shebang lines have no quoting: an interpreter path with white space cannot be expressed, and the kernel reads
only the first 256 bytes. Both are refused here, where the user can act, instead of failing inside
containerd.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHIM_NAMES = ("containerd-shim-kata-py-v2", "containerd-shim-kata-py")
TOOL_NAME = "kata-py"
RUNTIME_NAME = "runk"
# BINPRM_BUF_SIZE in linux/binfmts.h, since 5.1: the whole first line with its newline has to fit.
SHEBANG_LIMIT = 256

SHIM_SOURCE = """\
#!{python} -IS
import sys

sys.path += {folders!r}
from shim.cli import main

main()
"""

TOOL_SOURCE = """\
#!{python} -IS
import sys

sys.path += {folders!r}
from cli.main import main

main()
"""

RUNTIME_SOURCE = """\
#!{python} -IS
import sys

sys.path += {folders!r}
from runk.program import main

main()
"""


class LauncherError(Exception):
    """A launcher cannot be written for these paths; the text names the path and the remedy."""


def render(source: str, *, python: Path, folders: Sequence[Path]) -> str:
    """The text of a launcher.

    Raises LauncherError if the kernel could not start the interpreter from a script's first line.
    """
    if any(character.isspace() for character in str(python)):
        raise LauncherError(
            f"{python}: a script's first line cannot name an interpreter whose path contains white space;"
            " move the folder to a path without it"
        )
    text = source.format(python=python, folders=[str(folder) for folder in folders])
    first_line = text.partition("\n")[0]
    if len(os.fsencode(first_line)) >= SHEBANG_LIMIT:
        raise LauncherError(
            f"{python}: the path is too long for a script's first line (limit {SHEBANG_LIMIT} bytes);"
            " move the folder to a shorter path"
        )
    return text


def write(path: Path, text: str) -> None:
    """Replaces the program at `path` in one step: a start in the same moment sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_symlink() and path.read_text() == text:
        return
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(path)


def write_all(folder: Path, *, python: Path, folders: Sequence[Path]) -> list[Path]:
    """Writes the shim under both its names, the tool and the runtime into `folder`; returns what is there now."""
    shim, alias = (folder / name for name in SHIM_NAMES)
    write(shim, render(SHIM_SOURCE, python=python, folders=folders))
    if not (alias.is_symlink() and os.readlink(alias) == shim.name):
        alias.unlink(missing_ok=True)
        alias.symlink_to(shim.name)
    tool = folder / TOOL_NAME
    write(tool, render(TOOL_SOURCE, python=python, folders=folders))
    runtime = folder / RUNTIME_NAME
    write(runtime, render(RUNTIME_SOURCE, python=python, folders=folders))
    return [shim, alias, tool, runtime]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write launchers for this checkout and this interpreter.")
    parser.add_argument("folder", type=Path, help="where the launchers go, e.g. build/bin")
    options = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    installed = Path(sysconfig.get_path("purelib"))
    try:
        # Not resolved: the environment's own `python` link says which packages belong to it.
        write_all(options.folder, python=Path(sys.executable), folders=(root, installed))
    except LauncherError as error:
        sys.exit(f"launcher: {error}")


if __name__ == "__main__":
    main()

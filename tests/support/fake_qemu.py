"""QEMU without a machine: a program that accepts QEMU's arguments and speaks QMP on the socket it inherits.

The shim gives its helper programs a minimal environment, so a variant is a program file of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_SOURCE = """\
#!{python} -IS
import sys

sys.path.append({folder!r})
from qemu_program import main

main(__file__ + ".argv", {behaviour!r}, {detail!r})
"""


class FakeQemu:
    """The program file. `argv()` is how it was called the last time."""

    def __init__(self, path: Path, behaviour: str = "serve", detail: str = "") -> None:
        self.path = path
        self.become(behaviour, detail)

    def become(self, behaviour: str, detail: str = "") -> None:
        """Behave differently from the next start on; `qemu_program` lists the behaviours."""
        folder = str(Path(__file__).resolve().parent)
        text = _SOURCE.format(python=sys.executable, folder=folder, behaviour=behaviour, detail=detail)
        self.path.write_text(text)
        self.path.chmod(0o755)

    def argv(self) -> list[str]:
        """The arguments of the last start, program first. Raises FileNotFoundError if there was none."""
        words: list[str] = json.loads(Path(f"{self.path}.argv").read_text())
        return words

"""The Makefile's list of targets tells everything that it has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_is_the_default_and_complete() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    phony = re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+) ", make(), re.MULTILINE)
    # Parts of `check` that are not worth a line of their own.
    assert set(phony[1].split()) - set(listed) == {"lint", "types", "layers", "fresh"}
    assert listed[0] == "help"


def test_continuous_integration_runs_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == "exec make test"

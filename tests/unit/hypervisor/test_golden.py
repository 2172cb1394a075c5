"""QEMU's whole argument list for typical specifications, compared with reviewed files.

A case is `tests/golden/qemu/<arch>/<case>.toml` (fields of `VmSpec`, plus a table `fds`) and `<case>.args`, one
option per line. `GOLDEN_REWRITE=1 pytest tests/unit/hypervisor/test_golden.py` writes the second from the first.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.spec import QmpTimeouts, Share, VmSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "qemu"
CASES = sorted(GOLDEN.glob("*/*.toml"))
PATHS = {"run_dir", "qemu_path", "kernel", "initrd", "image", "firmware", "netns", "directory", "daemon"}


def typed(table: dict[str, Any]) -> dict[str, Any]:
    def value(key: str, raw: Any) -> Any:
        if key in PATHS:
            return Path(raw)
        return tuple(raw) if isinstance(raw, list) else raw

    return {key: value(key, raw) for key, raw in table.items()}


def read_case(path: Path) -> tuple[VmSpec, Fds]:
    table = tomllib.loads(path.read_text())
    fds = Fds(**typed(table.pop("fds")))
    shares = tuple(Share(**typed(share)) for share in table.pop("shares", []))
    return VmSpec(**{**typed(table), "arch": path.parent.name, "shares": shares}), fds


def one_option_per_line(argv: list[str]) -> str:
    lines = argv[:1]
    for word in argv[1:]:
        if word.startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_argv_is_as_reviewed(case: Path) -> None:
    spec, fds = read_case(case)
    text = one_option_per_line(build_cmdline(spec, fds))
    golden = case.with_suffix(".args")
    if os.environ.get("GOLDEN_REWRITE"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_field_of_the_specification_is_in_some_case() -> None:
    """A new field without a golden case is a field nobody has seen on the command line."""
    never_on_it = {"arch", "run_dir", "netns", "qmp"}
    seen = {key for case in CASES for key in tomllib.loads(case.read_text())}
    assert {field.name for field in fields(VmSpec)} - never_on_it <= seen


def test_defaults_of_the_handshake() -> None:
    assert QmpTimeouts() == QmpTimeouts(read_timeout_s=0.25, connect_timeout_s=5.0, retry_pause_s=0.05)

"""What the commands print. Colours and spinners appear on a terminal only; elsewhere it is plain lines."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cli.host_check import Finding
    from config import ConfigError, LoadedConfig

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "missing": "bold red"}


def console() -> Console:
    """Standard output. Lines are as long as they are: paths and commands stay copyable."""
    return Console(soft_wrap=True, highlight=False)


def fail(problem: str) -> None:
    """One line about a failure, to standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        Text.assemble(("kata-py: ", "bold red"), problem)
    )


def show_findings(findings: Sequence[Finding]) -> None:
    """One line for each finding, its remedy below it, and the verdict as the last line."""
    out = console()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        label = Text(f"{finding.level.value:<8}", STYLES[finding.level.value])
        out.print(Text.assemble(label, f"{finding.subject:<{width}}  ", finding.detail))
        if finding.remedy:
            out.print(Text(f"{'':8}{'':{width}}  -> {finding.remedy}", "bold"))
    missing = sum(finding.level.value == "missing" for finding in findings)
    if missing:
        out.print(Text(f"\nNot ready: {missing} of the above missing.", "bold red"))
    else:
        out.print(Text("\nReady to run containers.", "bold green"))


def show_problems(error: ConfigError) -> None:
    """Every problem of a configuration, one line each, to standard error."""
    for problem in error.problems:
        fail(str(problem))


def show_loaded(loaded: LoadedConfig) -> None:
    """Which files made up a configuration, and what is odd about it."""
    out = console()
    for warning in loaded.warnings:
        out.print(Text.assemble(("warning ", STYLES["warning"]), warning))
    out.print(Text.assemble(("ok ", STYLES["ok"]), str(loaded.path or "built-in defaults")))
    for drop_in in loaded.drop_ins:
        out.print(Text(f"   with {drop_in}"))


@contextmanager
def steps(out: Console) -> Iterator[Callable[[str], None]]:
    """Gives a function that announces the next step; meanwhile a spinner turns, and lines carry the time.

    Without a terminal each step is printed when it begins, so that a log shows what a slow build is doing.
    """
    started = time.monotonic()
    if not out.is_terminal:

        def announce(line: str) -> None:
            out.print(f"guest: {time.monotonic() - started:5.1f} s  {line}")

        yield announce
        return
    with out.status("starting") as status:
        current: list[str] = []

        def turn(line: str) -> None:
            finish()
            current.append(line)
            status.update(line)

        def finish() -> None:
            if current:
                out.print(f"guest: {time.monotonic() - started:5.1f} s  {current.pop()}")

        yield turn
        finish()

"""The one error of this package: everything that is wrong with a configuration, at once."""

from pathlib import Path
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing to correct.

    `file` is what set the key: the base file, a drop-in, an annotation (as text that says so), or None for a
    built-in default. `key` is dotted and empty when the whole file or annotation is meant.
    """

    file: Path | str | None
    key: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        where = str(self.file) if self.file else "built-in defaults"
        parts = (where, self.key, self.problem) if self.key else (where, self.problem)
        return ": ".join(parts) + (f" ({self.hint})" if self.hint else "")


class ConfigError(Exception):
    """The configuration cannot be used. `str()` is one line per problem; `problems` is never empty."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

    def in_one_line(self) -> str:
        """What is wrong and what to do, without the places; of problems with the same remedy, the first."""
        lines = {problem.hint: f"{problem.problem} ({problem.hint})" for problem in reversed(self.problems)}
        return "; ".join(reversed(lines.values()))

"""Merged TOML tables that remember which file set each key, and the list of problems found in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.errors import ConfigError, Problem

Origin = Path | str
"""What set a key: a file, or in words an annotation."""

KeyPath = tuple[str | int, ...]
"""The way to a value from the top of the file: table names, key, and the index inside an array."""

Table = dict[str, Any]


class Tree:
    """The base file with its drop-ins merged over it, not yet decoded."""

    def __init__(self, base: Path | None, table: Table) -> None:
        self.table = table
        self._base = base
        self._origins: dict[KeyPath, Origin] = {}

    def merge(self, origin: Origin, table: Table) -> None:
        """Lay one drop-in over the tree: tables join key by key, anything else replaces what was there."""
        self._join(self.table, table, (), origin)

    def forget(self, where: KeyPath) -> None:
        """Take a key out, as if nothing had set it. Harmless when nothing has."""
        table: Any = self.table
        for name in where[:-1]:
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table.pop(where[-1], None)
        self._origins.pop(where, None)

    def origin(self, where: KeyPath) -> Origin | None:
        """What set a key or, if nothing did, the base file (None: there is no file)."""
        for end in range(len(where), 0, -1):
            if where[:end] in self._origins:
                return self._origins[where[:end]]
        return self._base

    def origins(self) -> dict[str, str]:
        """What set each key that is set at all, by dotted names."""
        found: dict[str, str] = {}

        def collect(table: Table, where: KeyPath) -> None:
            for name, value in table.items():
                if isinstance(value, dict):
                    collect(value, (*where, name))
                else:
                    found[dotted((*where, name))] = str(self.origin((*where, name)))

        collect(self.table, ())
        return found

    def _join(self, into: Table, table: Mapping[str, Any], where: KeyPath, origin: Origin) -> None:
        for name, value in table.items():
            here = (*where, name)
            old = into.get(name)
            if isinstance(old, dict) and isinstance(value, dict):
                self._join(old, value, here, origin)
            else:
                into[name] = value
                self._origins[here] = origin


class Report:
    """Collects problems of one tree, so that the reader gets all of them at once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._problems: list[Problem] = []
        self._bad: set[KeyPath] = set()
        self.remarks: list[Problem] = []
        """What the user is to know about a configuration that can be used."""

    def remark(self, where: KeyPath, text: str, hint: str = "") -> None:
        """Say something about a key that is no mistake."""
        self.remarks.append(self.problem(where, text, hint))

    def add(self, where: KeyPath, problem: str, hint: str = "", *, also: tuple[KeyPath, ...] = ()) -> None:
        """Note a problem of the key at `where`.

        Ignored when that key, or one of those in `also`, is known to be wrong already: what is built on a
        wrong value is not a second mistake of the user.
        """
        if any(map(self.is_bad, (where, *also))):
            return
        self._bad.add(where)
        self._problems.append(self.problem(where, problem, hint))

    def problem(self, where: KeyPath, problem: str, hint: str = "") -> Problem:
        """What is to be said about the key at `where`, not noted."""
        return Problem(self._tree.origin(where), dotted(where), problem, hint)

    def note(self, problem: Problem) -> None:
        """Note a problem of something that has no place in the tree."""
        self._problems.append(problem)

    def is_bad(self, where: KeyPath) -> bool:
        """Whether a problem was noted for this key, for an item of it, or for a table around it."""
        return any(bad == where[: len(bad)] or _key_of(bad) == where for bad in self._bad)

    def raise_any(self) -> None:
        """Raise `ConfigError` with everything noted so far, if there is anything."""
        if self._problems:
            raise ConfigError(tuple(self._problems))


def dotted(where: KeyPath) -> str:
    """The key as it would be written in TOML; an array index is put in brackets."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _is_bare(part) else show_string(part))
    return text


def show_string(text: str) -> str:
    """A string for a one-line message: quoted, escaped, and cut when it is long."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _is_bare(name: str) -> bool:
    return name.isascii() and name.replace("_", "a").replace("-", "a").isalnum()


def _key_of(where: KeyPath) -> KeyPath:
    """The key that an item of an array belongs to."""
    for end, part in enumerate(where):
        if isinstance(part, int):
            return where[:end]
    return where

"""Reads a JSON document field by field. Every complaint names the field's place in the document."""

from __future__ import annotations

from oci_engine.errors import SpecError, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")
    from collections.abc import Callable, Collection

UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1
UINT64_MAX = 2**64 - 1


class Reader:
    """An object of the document. A field that is null counts as one that is not there, as in other runtimes."""

    def __init__(self, value: object, place: str = "") -> None:
        if not isinstance(value, dict):
            raise SpecError(place or "the document", f"want an object, got {kind_of(value)}")
        self._fields: dict[str, object] = value
        self.place = place

    def at(self, name: str) -> str:
        """Where a field is."""
        return f"{self.place}.{name}" if self.place else name

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def refuse(self, names: Collection[str], why: str) -> None:
        """Raises Unsupported for the first of these fields that asks for something."""
        for name in names:
            if self._fields.get(name) not in (None, "", [], {}, False):
                raise Unsupported(self.at(name), why)

    def text(self, name: str, default: str | None = None) -> str:
        """Required when there is no default. No NUL in it, which the kernel would take for its end."""
        value = self._fields.get(name)
        if value is None:
            if default is None:
                raise SpecError(self.at(name), "is missing")
            return default
        return _text(value, self.at(name))

    def choice(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        value = self.text(name, default)
        if value not in choices and value != default:
            raise SpecError(self.at(name), f"want one of {', '.join(sorted(choices))}, got {value!r}")
        return value

    def flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise SpecError(self.at(name), f"want true or false, got {kind_of(value)}")
        return value

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """Required when there is no default."""
        value = self.maybe_integer(name, least, most)
        if value is None:
            if default is None:
                raise SpecError(self.at(name), "is missing")
            return default
        return value

    def maybe_integer(self, name: str, least: int, most: int) -> int | None:
        value = self._fields.get(name)
        return None if value is None else _integer(value, self.at(name), least, most)

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(_text(value, place) for value, place in self._list(name))

    def integers(self, name: str, least: int, most: int) -> tuple[int, ...]:
        return tuple(_integer(value, place, least, most) for value, place in self._list(name))

    def objects(self, name: str, read: Callable[[Reader], T]) -> tuple[T, ...]:
        return tuple(read(Reader(value, place)) for value, place in self._list(name))

    def inner(self, name: str) -> Reader:
        """The object in a field; an empty one when it is not there."""
        value = self._fields.get(name)
        return Reader({} if value is None else value, self.at(name))

    def text_map(self, name: str) -> dict[str, str]:
        inner = self.inner(name)
        return {key: inner.text(key) for key in inner._fields if inner.has(key)}

    def names(self) -> list[str]:
        return list(self._fields)

    def _list(self, name: str) -> list[tuple[object, str]]:
        value = self._fields.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise SpecError(self.at(name), f"want an array, got {kind_of(value)}")
        return [(each, f"{self.at(name)}[{index}]") for index, each in enumerate(value)]


def kind_of(value: object) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise SpecError(place, f"want a string, got {kind_of(value)}")
    if "\0" in value:
        raise SpecError(place, "must not contain a NUL character")
    return value


def _integer(value: object, place: str, least: int, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        got = repr(value) if isinstance(value, float) else kind_of(value)
        raise SpecError(place, f"want a whole number, got {got}")
    if not least <= value <= most:
        raise SpecError(place, f"want a number from {least} to {most}, got {value}")
    return value

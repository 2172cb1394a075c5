"""Records: frozen objects with named fields, which are made with keywords only.

What `dataclasses` would do. Its import brings the tools for looking into source text with it, and it compiles the
methods of every class anew at each start: together longer than most calls of a command line take as a whole.
"""

from __future__ import annotations

# Not from `typing`, whose import takes as long as the whole interpreter's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, NoReturn, TypeVar, dataclass_transform

    R = TypeVar("R", bound="Record")
else:

    def dataclass_transform(**_options):
        return lambda kind: kind


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """Fields are the annotations of the class, with their defaults."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        cls._defaults = {name: cls.__dict__[name] for name in cls._fields if name in cls.__dict__}

    def __init__(self, **values: Any) -> None:
        if self._defaults:
            values = {**self._defaults, **values}
        if values.keys() != {*self._fields}:
            wrong = ", ".join(sorted(values.keys() ^ {*self._fields}))
            raise TypeError(f"{type(self).__name__}: missing or unknown: {wrong}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__[name] for name in self._fields))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({values})"


def replace(record: R, **changes: Any) -> R:
    """A copy with other values for some fields."""
    return type(record)(**{**record.__dict__, **changes})

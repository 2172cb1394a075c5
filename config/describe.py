"""Types and values in the words of a TOML user: for messages and for the reference."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta, Struct

from config.tree import show_string

_NAMES = {int: "int", float: "number", str: "string", bool: "bool"}


def wanted(kind: Any) -> str:
    """Name a field's type with its bounds: `int 0..65535`, `one of auto, kvm, tcg`, `array of string`."""
    inner, bounds = unwrap(kind)
    if get_origin(inner) is Literal:
        return _choice(get_args(inner))
    if get_origin(inner) is tuple:
        return f"array of {wanted(get_args(inner)[0])}"
    if isinstance(inner, type) and issubclass(inner, Struct):
        return "table"
    return _NAMES[inner] + _range(bounds)


def unwrap(kind: Any) -> tuple[Any, list[Meta]]:
    """Take `Annotated` and `| None` off a type; also give the annotations that were found on the way."""
    metas: list[Meta] = []
    while True:
        origin = get_origin(kind)
        if origin is Annotated:
            kind, *more = get_args(kind)
            metas += more
        elif origin in (Union, UnionType):
            (kind,) = (option for option in get_args(kind) if option is not NoneType)
        else:
            return kind, metas


def show(value: object) -> str:
    """A value from a TOML file, short enough for a message."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return show_string(value)
        case int() if value.bit_length() > 64:
            return "a very large number"
        case int() | float():
            return str(value)
        case dict():
            return "a table"
        case list() | tuple():
            return "an array" if value else "[]"
        case None:
            return "nothing"
        case _:
            return f"the date or time {value}"


def _choice(choices: tuple[object, ...]) -> str:
    shown = [str(choice) if choice != "" else '""' for choice in choices]
    return f"one of {', '.join(shown)}" if len(shown) > 1 else shown[0]


def _range(bounds: list[Meta]) -> str:
    low = max((meta.ge for meta in bounds if meta.ge is not None), default=None)
    high = min((meta.le for meta in bounds if meta.le is not None), default=None)
    if low is not None and high is not None:
        return f" {low:g}..{high}"
    return "" if low is None else f" >= {low:g}"

"""JSON through the C half of the standard library alone.

Its Python half needs regular expressions for what the C half does by itself, and their import takes longer than most
calls of a command line as a whole.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WHITE_SPACE = " \t\n\r"


class _Options:
    """What `json.JSONDecoder` is without arguments."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int = float, int
    parse_constant = {"-Infinity": float("-inf"), "Infinity": float("inf"), "NaN": float("nan")}.__getitem__


_scan = make_scanner(_Options)  # type: ignore[arg-type]


def loads(text: str) -> Any:
    """Raises ValueError with the place."""
    start = len(text) - len(text.lstrip(_WHITE_SPACE))
    try:
        value, end = _scan(text, start)
    except StopIteration as err:
        raise ValueError(f"Expecting value (char {err.value})") from None
    except (ImportError, SystemError):
        # The scanner's error is the Python half's, for which Python 3.11 only looks among the modules that are loaded.
        raise ValueError(_problem(text)) from None
    if text[end:].strip(_WHITE_SPACE):
        raise ValueError(f"Extra data (char {end})")
    return value


def _problem(text: str) -> str:
    """What is wrong, in the words of the Python half, which a guest does not have."""
    try:
        import json

        json.loads(text)
    except ImportError:
        return "it has a mistake somewhere"
    except ValueError as err:
        return str(err)
    return "it cannot be read"


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} cannot be told as JSON")


_encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ": ", ", ", False, False, True)


def dumps(value: object) -> str:
    """On one line."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return "".join(_encode(value, 0))


def pretty(value: object, indent: int = 2, _before: str = "\n") -> str:
    """On many lines, for people."""
    inside = _before + " " * indent
    if isinstance(value, dict) and value:
        fields = (f"{dumps(key)}: {pretty(each, indent, inside)}" for key, each in value.items())
        return "{" + ",".join(inside + field for field in fields) + _before + "}"
    if isinstance(value, list) and value:
        return "[" + ",".join(inside + pretty(each, indent, inside) for each in value) + _before + "]"
    return dumps(value)

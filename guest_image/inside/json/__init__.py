# mypy: ignore-errors
"""JSON by the halves of the standard library's package that are written in C."""

from _json import encode_basestring_ascii, make_encoder, make_scanner
from json.decoder import JSONDecodeError

__all__ = ["JSONDecodeError", "dumps", "load", "loads"]


class _Settings:
    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def _refuse(value):
    raise TypeError(f"{type(value).__name__} is no JSON type")


_scan = make_scanner(_Settings)
_encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ": ", ", ", False, False, True)


def dumps(value):
    return "".join(_encode(value, 0))


def loads(text):
    if isinstance(text, bytes):
        text = text.decode()
    text = text.strip(" \t\n\r")
    try:
        value, end = _scan(text, 0)
    except StopIteration as err:
        raise JSONDecodeError("Expecting value", text, err.value) from None
    if end != len(text):
        raise JSONDecodeError("Extra data", text, end)
    return value


def load(file):
    return loads(file.read())

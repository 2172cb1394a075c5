"""JSON writing. The standard library's package brings the regular expressions along, for reading; we only write."""

from __future__ import annotations

from _json import encode_basestring_ascii


def dumps(value: object) -> str:
    """One line of JSON. What is not a JSON type is written as its text, so a log line can hold anything."""
    parts: list[str] = []
    _write(value, parts.append)
    return "".join(parts)


def _write(value: object, put: object) -> None:
    assert callable(put)
    if isinstance(value, str):
        put(encode_basestring_ascii(value))
    elif value is None or isinstance(value, bool):
        put({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int):
        put(int.__repr__(value))
    elif isinstance(value, float) and value - value == 0:  # neither infinite nor "not a number"
        put(float.__repr__(value))
    elif isinstance(value, dict):
        separator = "{"
        for key, item in value.items():
            put(separator)
            put(encode_basestring_ascii(str(key)))
            put(":")
            _write(item, put)
            separator = ","
        put("}" if value else "{}")
    elif isinstance(value, (list, tuple)):
        separator = "["
        for item in value:
            put(separator)
            _write(item, put)
            separator = ","
        put("]" if value else "[]")
    else:
        put(encode_basestring_ascii(str(value)))

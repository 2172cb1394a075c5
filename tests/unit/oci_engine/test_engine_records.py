"""What the engine has of its own where the standard library would load too much."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oci_engine import json_text
from oci_engine.records import Record, replace
from oci_engine.undo import Undo, suppress

ROOT = Path(__file__).resolve().parents[3]


class Point(Record):
    x: int
    y: int = 7


def test_records() -> None:
    point = Point(x=1)
    assert (point.x, point.y) == (1, 7)
    assert point == Point(y=7, x=1)
    assert len({point, Point(y=7, x=1), Point(x=2)}) == 2
    assert point != Point(x=1, y=8)
    assert repr(point) == "Point(x=1, y=7)"
    assert replace(point, x=3) == Point(x=3)
    with pytest.raises(TypeError, match=r"Point: missing or unknown: x$"):
        Point(y=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Point: missing or unknown: z"):
        replace(point, z=3)
    with pytest.raises(AttributeError, match=r"Point\.x cannot be changed"):
        point.x = 3  # type: ignore[misc]


DOCUMENTS = [
    {}, [], "a\u0000\u1234\N{GRINNING FACE}\"\\", 0, -1, 1.5, 1e400, True, None, 2**70, [[[]]],
    {"a": {"b": [1, "c", {}]}},
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_json_there_and_back(document: object) -> None:
    text = json_text.dumps(document)
    assert text == json.dumps(document)
    assert json_text.loads(f" \r\n\t{text}\n") == document
    for indent in (2, 4):
        assert json_text.pretty(document, indent) == json.dumps(document, indent=indent)


@pytest.mark.parametrize("text", ["", " ", "{", "[1,]", '{"a" 1}', "nul", "1 2", '"\n"', "{} x", "\ufeff{}"])
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\(char \d+\)$"):
        json_text.loads(text)


@pytest.mark.parametrize(
    ("before", "said"),
    [("", "Expecting ':' delimiter"), ("sys.modules['json'] = None", "it has a mistake somewhere")],
)
def test_mistakes_where_the_python_half_is_not_loaded(before: str, said: str) -> None:
    """As in a program that has just begun, and as in a guest."""
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
from oci_engine import json_text
{before}
try:
    json_text.loads('{{"a" 1}}')
except ValueError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    assert said in done.stdout


def test_what_is_not_json() -> None:
    with pytest.raises(TypeError, match="set cannot be told as JSON"):
        json_text.dumps({"a": {1}})


def test_undo() -> None:
    calls: list[int] = []
    with pytest.raises(ZeroDivisionError), Undo() as undo:
        undo.callback(calls.append, 1)
        undo.callback(divmod, 1, 0)
        undo.callback(calls.append, 2)
        raise KeyError
    assert calls == [2, 1]
    with Undo() as undo:
        undo.callback(calls.append, 3)
        undo.keep()
    assert calls == [2, 1]
    with pytest.raises(KeyError), suppress(ValueError):
        raise KeyError
    with suppress(ValueError, LookupError):
        raise KeyError


SLOW = {"argparse", "contextlib", "dataclasses", "enum", "json", "re", "socket", "typing"}


def test_nothing_slow_is_loaded() -> None:
    """A command line pays for it at each call, and the imports are most of what it costs."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import runk.program, runk.sealed, runk.cli, runk.tables;"
        " import runk.foreground, runk.exec_process, runk.signals, oci_engine.making; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    assert SLOW.isdisjoint(done.stdout.split())

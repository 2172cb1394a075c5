from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.jsontext import dumps

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_written_reads_back(value: Any) -> None:
    text = dumps(value)
    assert json.loads(text) == value
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1, 2), "[1,2]"),
        ([], "[]"),
        ({}, "{}"),
        ({1: True}, '{"1":true}'),
        (b"x", "\"b'x'\""),
        (math.inf, '"inf"'),
        (OSError(2, "gone"), '"[Errno 2] gone"'),
        ({"a": [None, {"b": "\n\u20ac"}]}, '{"a":[null,{"b":"\\n\\u20ac"}]}'),
    ],
)
def test_text(value: Any, text: str) -> None:
    assert dumps(value) == text

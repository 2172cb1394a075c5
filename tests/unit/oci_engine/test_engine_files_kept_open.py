"""Which of the caller's open files a container is given."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import os
folder = os.open("/", os.O_RDONLY)  # the lowest number that is free
from oci_engine.errors import EngineError
from oci_engine.making import _preserved
from oci_engine.options import Streams
try:
    print(*_preserved(Streams(preserve_fds=1)))
except EngineError as err:
    print(err)
"""


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("3</dev/null", "3"),
        ("3<&-", "file descriptor 3 is to be preserved, but the caller has not opened it"),
    ],
)
def test_the_callers_own_and_never_one_of_ours(redirection: str, said: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, _PROGRAM],
        check=True, capture_output=True, text=True, close_fds=True,
    )  # fmt: skip
    assert done.stdout.strip() == said

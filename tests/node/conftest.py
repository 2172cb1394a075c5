"""The machine of these tests: booted once, for all of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.node import machine

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
#: The machine is emulated, and what runs in it takes some ten times as long as on this host.
TEST_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vm")
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@pytest.fixture(scope="module")
def node() -> Iterator[machine.Node]:
    """Up; everything of it is gone after the module, since tests of other tiers reap all children of the session."""
    if os.geteuid() != 0:
        pytest.skip("the machine has the host's files, which root alone can share")
    if os.uname().machine != "x86_64":
        pytest.skip("the machine is an x86_64 one with the host's programs, and this host is none")
    if not (machine.IMAGE / "initrd.img").exists():
        pytest.fail("build/node is missing: run `make node`")
    with (
        # Short: sockets are in it.
        tempfile.TemporaryDirectory(prefix="kpn-", dir="/tmp") as folder,
        machine.booted(Path(folder)) as node,
    ):
        yield node

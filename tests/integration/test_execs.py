"""Many execs in one container: all at once, and one after the other. What the shim had open before, it has after."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.integration.faults import parts, until
from tests.support.host import open_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

AT_ONCE = 100
ALL_LIMIT_S = 250.0  # half a minute without KVM, on a host with nothing else to do
IN_A_ROW = 20
# What is promised for one of them, without KVM.
EXEC_LIMIT_S = 2.0


@pytest.fixture(scope="module")
def container(containerd: Containerd) -> Iterator[str]:
    """One that sleeps; one virtual machine for all tests here."""
    name = containerd.start("sleep", "1000000")
    yield name
    containerd.remove(name)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.timeout(600)
def test_a_hundred_at_once(containerd: Containerd, container: str) -> None:
    """Each with its own exit status and its own streams."""
    containerd.exec(container, "true")
    shim = parts(container)["shim"]
    before = open_files(shim), threads(shim)

    def run(number: int) -> tuple[int, str, str]:
        script = f"cat; echo {number} >&2; exit {number}"
        done = containerd.exec(container, "sh", "-c", script, input=f"in {number}\n", timeout_s=ALL_LIMIT_S)
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run, range(AT_ONCE)))
    assert results == [(number, f"in {number}\n", f"{number}\n") for number in range(AT_ONCE)]
    # `ctr` has its answer to `Delete`; the connections that it was asked on are containerd's.
    until(lambda: (open_files(shim), threads(shim)) == before)


def test_a_word_of_input_twenty_times(containerd: Containerd, container: str) -> None:
    """`echo x | ctr tasks exec ... cat`: no end of the input is missed."""
    took = []
    for number in range(IN_A_ROW):
        began = time.monotonic()
        done = containerd.exec(container, "cat", input=f"{number}\n")
        took.append(time.monotonic() - began)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{number}\n", "")
    assert sorted(took)[IN_A_ROW // 2] < EXEC_LIMIT_S, took

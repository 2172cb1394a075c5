"""The leak check itself: it sees what a running container has on the host, and accepts one that is gone.

runc stands in for our runtime, so these tests say something about the fixtures and nothing about the shim.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.integration.containerd import Containerd, HostState, leftovers
from tests.support.host import descendants


@pytest.fixture
def with_runc(containerd: Containerd) -> Containerd:
    return replace(containerd, runtime="io.containerd.runc.v2")


def test_run_reports_output_and_status(with_runc: Containerd) -> None:
    done = with_runc.run("sh", "-c", "head -n1; echo problem >&2; exit 7", input="hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello\n", "problem\n")


def test_exec_runs_in_the_container(with_runc: Containerd) -> None:
    container = with_runc.start("sleep", "1000")
    try:
        assert with_runc.exec(container, "cat", input="there\n").stdout == "there\n"
    finally:
        with_runc.remove(container)


def test_each_kind_of_leftover_is_seen(with_runc: Containerd, host_state: HostState) -> None:
    container = with_runc.start("sleep", "1000")
    seen = host_state.difference(HostState.take(with_runc))
    with_runc.remove(container)
    kinds = {line.split(":")[0] for line in seen if container in line or "sleep" in line}
    assert kinds == {"+ processes", "+ mounts", "+ cgroups", "+ entries", "+ objects"}
    assert leftovers(host_state, with_runc) == []


def test_orphaned_shims_are_descendants(with_runc: Containerd) -> None:
    container = with_runc.start("sleep", "1000")
    try:
        # The process that containerd started has ended after starting another one: the shim.
        found = descendants(os.getpid()).values()
    finally:
        with_runc.remove(container)
    assert any("containerd-shim-runc-v2" in name and container in name for name in found)

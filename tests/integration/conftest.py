"""Fixtures of the integration tests: a private containerd, and proof that no test leaves anything behind.

Environment: KATA_PY_TEST_CONTAINERD_DIR is a folder with another version's `containerd` and `ctr`;
KATA_PY_TEST_LOG_LEVEL=debug makes containerd and the shims say more. What a failed test leaves for reading
is in build/test-results/<test>, or in KATA_PY_TEST_RESULTS.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration import containerd as support
from tests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

HERE = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("KATA_PY_TEST_RESULTS") or support.REPOSITORY / "build" / "test-results")
# A boot without KVM takes seconds, and the first test also pays for starting containerd.
TEST_TIMEOUT_S = 300
# What these are about lies between shim and guest, and containerd's version has no part in it.
ONE_VERSION_MODULES = frozenset(
    {
        "test_execs",
        "test_failed_creates",
        "test_fault_matrix",
        "test_foreign",
        "test_idle",
        "test_network",
        "test_oom",
        "test_output",
        "test_pod_disks",
        "test_pod_security",
        "test_pod_volumes",
    }
)
FAILED = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """Lets SIGTERM end the session as Ctrl-C does: containerd and its containers must not stay behind."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what lies here as integration tests, with their own time limit unless a test sets one."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("integration")
            if item.path.stem in ONE_VERSION_MODULES:
                item.add_marker("one_version")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the report passes through untouched
    """Remembers for the fixtures' teardown whether set-up or test failed."""
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.stash[FAILED] = True
    return (yield)


@pytest.fixture(scope="session")
def adopted_orphans() -> Iterator[None]:
    """What containerd's programs leave without a parent becomes this session's, until its end."""
    host.adopt_orphans(adopt=True)
    yield
    host.adopt_orphans(adopt=False)


@pytest.fixture(scope="session")
def containerd(adopted_orphans: None) -> Iterator[support.Containerd]:
    """A private containerd with the image imported; it and all it started end with the session."""
    namespace = f"kp-{secrets.token_hex(4)}"
    with support.running(namespace) as containerd:
        yield containerd
    support.remove_namespace_cgroups(namespace)


@pytest.fixture
def restored_configuration(containerd: support.Containerd) -> Iterator[None]:
    """For tests that write another configuration: the next one finds it as it was."""
    text = containerd.config.read_text()
    yield
    containerd.config.write_text(text)


@pytest.fixture
def container_id(containerd: support.Containerd) -> str:
    """An id for this test's container."""
    return containerd.new_id()


@pytest.fixture(autouse=True)
def host_state(request: pytest.FixtureRequest, containerd: support.Containerd) -> Iterator[support.HostState]:
    """The host's state before the test; fails the test if anything is different after it."""
    before = support.HostState.take(containerd)
    offset = containerd.server.log_size()
    yield before
    failed = request.node.stash.get(FAILED, False)
    # A test that ended containerd and failed before it had another one must not take the others with it.
    containerd.server.start()
    # A test that stopped half-way had no chance to tidy up: what is there is only noted, at once.
    left = support.leftovers(before, containerd, settle_s=0.0 if failed else support.SETTLE_S)
    if failed or left:
        name = re.sub(r"[^\w.-]+", "_", request.node.name)
        support.keep_results(RESULTS / name, containerd, offset, left)
        support.clean_up(before, containerd)
    if left and not failed:
        pytest.fail("the test left this on the host:\n" + "\n".join(left), pytrace=False)

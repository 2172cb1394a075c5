"""Fixtures of the configuration's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.config.config_site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty installation below the test's own folder."""
    return Site(tmp_path)


@pytest.fixture
def in_qemu(site: Site) -> Callable[[str], str]:
    """Put the lines that name the guest's files in front of a text that goes on in [hypervisor.qemu]."""

    def complete(text: str) -> str:
        return f"[hypervisor.qemu]\n{site.required()}{text}"

    return complete

"""What containerd 2 learns of the runtime without starting anything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from shim import RUNTIME_NAME, VERSION

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd


@pytest.fixture(autouse=True)
def _containerd_2(containerd: Containerd) -> None:
    if containerd.server.generation() < 2:
        pytest.skip("needs containerd 2.0 or newer: see KATA_PY_TEST_CONTAINERD_DIR")


def test_runtime_info(containerd: Containerd) -> None:
    arguments = ("plugins", "inspect-runtime", "--runtime", containerd.runtime)
    info = json.loads(containerd.checked(*arguments))
    assert (info["Name"], info["Version"]["Version"]) == (RUNTIME_NAME, VERSION)
    assert info["Features"]["linux"]["mountExtensions"] == {"idmap": {"enabled": False}}
    config = str(containerd.config)
    with_options = json.loads(containerd.checked(*arguments, "--runtime-config-path", config))
    assert with_options["Options"]["config_path"] == config

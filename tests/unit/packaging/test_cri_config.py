"""The CRI part of a private containerd's configuration, read back as containerd reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from cri_config import PLUGINS, CriConfig, Handler

CONFIG = CriConfig(
    snapshotter="native",
    pause_image="local/pause:1",
    handlers={
        "first": Handler(
            runtime_type="io.containerd.first.v2",
            options={"ConfigPath": '/with "quotes"'},
            settings={"sandboxer": "shim", "privileged_without_host_devices": True},
        ),
        "with.dot": Handler(runtime_type="io.containerd.second.v1"),
    },
    networks=Path("/n"),
    network_programs=Path("/p"),
)
RUNTIMES = {
    "first": {
        "runtime_type": "io.containerd.first.v2",
        "sandboxer": "shim",
        "privileged_without_host_devices": True,
        "options": {"ConfigPath": '/with "quotes"'},
    },
    "with.dot": {"runtime_type": "io.containerd.second.v1"},
}
STREAMS = {"stream_server_address": "127.0.0.1", "stream_server_port": "0"}


def plugins(version: int) -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads(CONFIG.render(version))["plugins"]
    return read


def test_version_2_has_one_table() -> None:
    assert plugins(2) == {
        "io.containerd.grpc.v1.cri": {
            **STREAMS,
            "netns_mounts_under_state_dir": True,
            "sandbox_image": "local/pause:1",
            "containerd": {
                "snapshotter": "native",
                "default_runtime_name": "first",
                "runtimes": RUNTIMES,
            },
            "cni": {"conf_dir": "/n", "bin_dir": "/p"},
        }
    }


def test_version_3_has_three() -> None:
    assert plugins(3) == {
        "io.containerd.grpc.v1.cri": STREAMS,
        "io.containerd.cri.v1.images": {
            "snapshotter": "native",
            "pinned_images": {"sandbox": "local/pause:1"},
        },
        "io.containerd.cri.v1.runtime": {
            "netns_mounts_under_state_dir": True,
            "containerd": {"default_runtime_name": "first", "runtimes": RUNTIMES},
            "cni": {"conf_dir": "/n", "bin_dirs": ["/p"]},
        },
    }


@pytest.mark.parametrize("version", [2, 3])
def test_every_table_belongs_to_a_plugin_that_is_off_otherwise(version: int) -> None:
    assert set(plugins(version)) <= set(PLUGINS)

"""Bundles, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shim.bundle import Bundle
from shim.errors import InvalidRequest
from tests.support import bundles


def load(folder: Path, config: object) -> Bundle:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Bundle.load("c1", folder)


def test_whole_spec(tmp_path: Path) -> None:
    config = bundles.spec(bundles.shell("true"), annotations=bundles.pod("container", "pod"))
    bundle = load(tmp_path, config)
    assert (bundle.raw, bundle.path, bundle.container_id) == (config, tmp_path, "c1")
    assert (bundle.spec.hostname, bundle.sandbox_id) == ("fake", "pod")
    assert bundle.rootfs == tmp_path / "rootfs"
    assert bundle.spec.mounts[0].destination == "/proc"


def test_least_spec(tmp_path: Path) -> None:
    bundle = load(tmp_path, {})
    assert (bundle.sandbox_id, bundle.spec.netns, bundle.spec.mounts) == ("c1", None, ())


def test_absolute_rootfs(tmp_path: Path) -> None:
    assert load(tmp_path, {"root": {"path": "/other/rootfs"}}).rootfs == Path("/other/rootfs")


@pytest.mark.parametrize(
    ("namespaces", "netns"),
    [
        ([], None),
        ([{"type": "network"}], None),
        ([{"type": "network", "path": ""}], None),
        ([{"type": "pid", "path": "/proc/7/ns/pid"}], None),
        ([{"type": "network", "path": "/proc/0/ns/net"}], None),
        ([{"type": "mount"}, {"type": "network", "path": "/run/netns/x"}], Path("/run/netns/x")),
    ],
)
def test_netns(tmp_path: Path, namespaces: list[dict[str, str]], netns: Path | None) -> None:
    assert load(tmp_path, {"linux": {"namespaces": namespaces}}).spec.netns == netns


@pytest.mark.parametrize(
    "config",
    [
        {"hostname": None, "annotations": None, "mounts": None, "root": None, "linux": None},
        {"linux": {"namespaces": None}},
        {"mounts": [{"destination": "/x", "source": None, "type": None, "options": None}]},
        {"linux": {"namespaces": [{"type": "network", "path": None}]}},
        {"root": {"path": "rootfs", "readonly": None}},
    ],
    ids=["top", "namespaces", "mount", "namespace", "root"],
)
def test_null_is_absent(tmp_path: Path, config: dict[str, Any]) -> None:
    """What Go programs write for an empty slice or map without `omitempty`."""
    assert load(tmp_path, config).spec.netns is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", ["not an OCI runtime spec"]),
        ("[]", ["not an OCI runtime spec"]),
        ('{"hostname": ', ["not an OCI runtime spec"]),
        ("config", ["not an OCI runtime spec"]),
        ({"hostname": 5}, ["hostname"]),
        ({"mounts": [{"source": "x"}]}, ["destination", "mounts[0]"]),
        ({"linux": {"namespaces": [{"type": 1}]}}, ["linux.namespaces[0].type"]),
        ({"annotations": {"a": 1}}, ["annotations"]),
    ],
)
def test_refused(tmp_path: Path, config: object, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(tmp_path, config)
    text = str(caught.value)
    assert text.startswith(f"bundle of container c1: {tmp_path}/config.json ")
    for word in words:
        assert word in text


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"container c1: .*/config.json: No such file"):
        Bundle.load("c1", tmp_path)

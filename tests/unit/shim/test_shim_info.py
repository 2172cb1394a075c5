"""What `-info` says, read as containerd reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as ProtoAny

from shim import info
from shim.api.gen import runc_options_pb2, runtimeoptions_pb2, types_pb2

if TYPE_CHECKING:
    from pathlib import Path


def read(options: bytes = b"") -> types_pb2.RuntimeInfo:
    return types_pb2.RuntimeInfo.FromString(info.runtime_info(options))


def test_features_are_the_runtime_specs() -> None:
    features: dict[str, Any] = json.loads(read().features.value)
    assert set(features) <= {
        "ociVersionMin",
        "ociVersionMax",
        "hooks",
        "mountOptions",
        "linux",
        "annotations",
    }
    assert set(features["linux"]) <= {
        "namespaces", "capabilities", "cgroup", "seccomp", "apparmor", "selinux", "intelRdt", "mountExtensions",
    }  # fmt: skip
    for words in (
        features["mountOptions"],
        features["linux"]["capabilities"],
        features["linux"]["namespaces"],
    ):
        assert words == sorted(set(words))
    assert len(features["linux"]["capabilities"]) == 41  # linux/capability.h of 5.9 and later
    assert features["hooks"][:2] == ["prestart", "createRuntime"]
    # Ids are not mapped: nobody may count on it.
    assert features["linux"]["mountExtensions"]["idmap"]["enabled"] is False


@pytest.mark.parametrize(
    ("url", "value", "told"),
    [
        ("runtimeoptions.v1.Options", runtimeoptions_pb2.Options(config_path="/c").SerializeToString(), True),
        ("containerd.runc.v1.Options", runc_options_pb2.Options(binary_name="/r").SerializeToString(), False),
    ],
)
def test_only_our_options_are_told(url: str, value: bytes, told: bool) -> None:
    options = ProtoAny(type_url=url, value=value)
    assert read(options.SerializeToString()).options == (options if told else ProtoAny())


def test_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "__file__", str(tmp_path / "shim" / "info.py"))
    assert info.revision() == ""
    (tmp_path / "REVISION").write_text("abc-dirty\n")
    assert read().version.revision == "abc-dirty"

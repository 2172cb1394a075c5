"""Stdin's three dialects, told apart."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from shim.api.gen import bootstrap_pb2, runc_options_pb2, runtimeoptions_pb2
from shim.bootstrap import SOCKET_DIR, Bootstrap, config_path
from shim.cli import Flags

ENVIRONMENT = {"TTRPC_ADDRESS": "/env/ttrpc", "GRPC_ADDRESS": "/env/grpc", "NAMESPACE": "env-ns"}


def boot(bundle: str = "/bundle", **flags: str) -> Bootstrap:
    parsed = Flags()
    for name, value in {"id": "pod", "namespace": "ns", "address": "/flag/grpc", **flags}.items():
        setattr(parsed, name, value)
    return Bootstrap(parsed, ENVIRONMENT, bundle)


def kata_options(path: str, *, prefix: str = "") -> Any:
    options = runtimeoptions_pb2.Options(type_url="x", config_path=path)
    return Any(type_url=f"{prefix}runtimeoptions.v1.Options", value=options.SerializeToString())


def params(**fields: object) -> bootstrap_pb2.BootstrapParams:
    return bootstrap_pb2.BootstrapParams(**{"instance_id": "pod", "namespace": "ns", **fields})  # type: ignore[arg-type]


def test_flags_and_environment() -> None:
    start = boot()
    start.read_stdin(b"")
    assert (start.id, start.namespace, start.bundle, start.grpc_address) == (
        "pod",
        "ns",
        "/bundle",
        "/flag/grpc",
    )
    assert (start.ttrpc_address, start.socket_dir, start.options) == ("/env/ttrpc", SOCKET_DIR, b"")
    assert (start.speaks_protobuf, start.debug) == (False, False)


def test_environment_fills_missing_flags() -> None:
    start = boot(namespace="", address="")
    assert (start.namespace, start.grpc_address) == ("env-ns", "/env/grpc")


def test_options() -> None:
    start, options = boot(), kata_options("/c.toml").SerializeToString()
    start.read_stdin(options)
    assert (start.options, start.speaks_protobuf) == (options, False)
    assert config_path(start.options) == "/c.toml"


def test_params() -> None:
    message = params(
        log_level=bootstrap_pb2.LOG_LEVEL_TRACE,
        containerd_ttrpc_address="/p/ttrpc",
        containerd_grpc_address="/p/grpc",
        socket_dir="/p/s",
    )
    message.extensions.add().value.CopyFrom(Any(type_url="other", value=b"\1"))
    message.extensions.add().value.CopyFrom(kata_options("/c.toml"))
    start = boot()
    start.read_stdin(message.SerializeToString())
    assert start.speaks_protobuf
    assert (start.ttrpc_address, start.grpc_address, start.socket_dir) == ("/p/ttrpc", "/p/grpc", "/p/s")
    assert (start.debug, config_path(start.options)) == (True, "/c.toml")


@pytest.mark.parametrize(
    ("level", "debug"), [("TRACE", True), ("DEBUG", True), ("INFO", False), ("WARN", False), ("PANIC", False)]
)
def test_log_level(level: str, debug: bool) -> None:
    start = boot()
    start.read_stdin(params(log_level=f"LOG_LEVEL_{level}").SerializeToString())
    assert start.debug is debug


def test_empty_params_fields_do_not_hide_the_environment() -> None:
    start = boot()
    start.read_stdin(params(socket_dir="").SerializeToString())
    assert (start.ttrpc_address, start.grpc_address, start.socket_dir) == (
        "/env/ttrpc",
        "/flag/grpc",
        SOCKET_DIR,
    )


@pytest.mark.parametrize(
    ("folder", "sandbox_api", "version_3"),
    [
        ("io.containerd.runtime.v2.task", False, False),
        ("io.containerd.sandbox.controller.v1.shim", True, True),
        ("io.containerd.sandbox.controller.v1.local", True, False),
    ],
)
def test_whose_bundle_it_is(folder: str, sandbox_api: bool, version_3: bool) -> None:
    start = boot(bundle=f"/run/containerd/{folder}/ns/pod")
    assert (start.sandbox_api, start.answers_version_3) == (sandbox_api, version_3)


def test_params_of_a_later_containerd() -> None:
    """A version that we do not know, fields that we do not know, extensions that are none of ours."""
    message = params(containerd_version="99.1", socket_dir="/p/s", containerd_binary="/bin/containerd")
    message.extensions.add()
    message.extensions.add().value.CopyFrom(Any(type_url="runtimeoptions.v2.Options", value=b"\x12\x01x"))
    message.extensions.add().value.CopyFrom(kata_options("/c.toml"))
    unknown = b"\xa2\x06\x03new" + b"\xa8\x06\x07"  # fields 100 (text) and 101 (a number)
    start = boot()
    start.read_stdin(message.SerializeToString() + unknown)
    assert (start.speaks_protobuf, start.socket_dir, start.debug) == (True, "/p/s", False)
    assert config_path(start.options) == "/c.toml"


@pytest.mark.parametrize("field", ["instance_id", "namespace"])
def test_params_of_somebody_else_are_not_believed(field: str) -> None:
    start = boot()
    start.read_stdin(params(**{field: "another"}, socket_dir="/p/s").SerializeToString())
    assert (start.speaks_protobuf, start.socket_dir) == (False, SOCKET_DIR)


@given(st.binary(max_size=100))
def test_any_bytes_are_fine(data: bytes) -> None:
    start = boot()
    start.read_stdin(data)
    assert start.options in (b"", data)
    config_path(data)


@given(st.binary(max_size=60))
def test_malformed_params_are_a_value_error_at_most(rest: bytes) -> None:
    start = boot()
    try:
        start.read_stdin(params().SerializeToString() + rest)
    except ValueError:
        return
    assert start.id == "pod"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (kata_options("/c.toml"), "/c.toml"),
        (kata_options("/c.toml", prefix="type.googleapis.com/"), "/c.toml"),
        (kata_options(""), ""),
        (Any(type_url="runtimeoptions.v1.Options"), ""),
        (Any(type_url="containerd.runc.v1.Options", value=runc_options_pb2.Options(
            binary_name="/usr/bin/runc").SerializeToString()), None),
        (Any(type_url="runtimeoptions.v1.Options", value=b"\x12\xff"), None),
        (Any(), None),
    ],
    ids=["path", "prefixed url", "empty path", "no value", "runc", "broken", "empty"],
)  # fmt: skip
def test_config_path(options: Any, path: str | None) -> None:
    assert config_path(options.SerializeToString()) == path

"""Bytes on the wire, written by hand from the protobuf encoding and the numbers in the tables.

A key is `number << 3 | kind`; kind 0 is a varint, 2 is a length and that many bytes. A negative number is ten
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from shim.api.gen import (
    bootstrap_pb2,
    cgroups_v1_pb2,
    cgroups_v2_pb2,
    events_pb2,
    runc_options_pb2,
    runtimeoptions_pb2,
    sandbox_pb2,
    task_types_pb2,
    task_v2_pb2,
    task_v3_pb2,
    ttrpc_events_pb2,
    types_pb2,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

EXIT = b"\x0a\x01c\x12\x01e\x18\x05\x20\x89\x01\x2a\x02\x08\x09"
"""TaskExit: container "c", exec "e", pid 5, status 137, 9 s after 1970."""

CASES = {
    "params": (
        bootstrap_pb2.BootstrapParams(
            instance_id="i",
            namespace="n",
            log_level=bootstrap_pb2.LOG_LEVEL_DEBUG,
            extensions=[bootstrap_pb2.Extension(value=Any(type_url="t", value=b"v"))],
            socket_dir="",
        ),
        (
            b"\x0a\x01i\x12\x01n"
            b"\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # -4
            b"\x42\x08\x0a\x06\x0a\x01t\x12\x01v"
            b"\x4a\x00"
        ),  # present although empty
    ),
    "result": (
        bootstrap_pb2.BootstrapResult(version=3, address="unix:///s", protocol="ttrpc"),
        b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc",
    ),
    "delete": (
        task_v2_pb2.DeleteResponse(exit_status=137, exited_at=Timestamp(seconds=9)),
        b"\x10\x89\x01\x1a\x02\x08\x09",
    ),
    "create": (
        task_v3_pb2.CreateTaskRequest(
            id="c",
            rootfs=[types_pb2.Mount(type="bind", source="/s", options=["ro"])],
            terminal=True,
            options=Any(type_url="t"),
        ),
        b"\x0a\x01c\x1a\x0e\x0a\x04bind\x12\x02/s\x22\x02ro\x20\x01\x52\x03\x0a\x01t",
    ),
    "state": (
        task_v3_pb2.StateResponse(id="c", pid=5, status=task_types_pb2.RUNNING, exec_id="e"),
        b"\x0a\x01c\x18\x05\x20\x02\x5a\x01e",
    ),
    "exit": (
        events_pb2.TaskExit(container_id="c", id="e", pid=5, exit_status=137, exited_at=Timestamp(seconds=9)),
        EXIT,
    ),
    "forward": (
        ttrpc_events_pb2.ForwardRequest(
            envelope=types_pb2.Envelope(
                namespace="k8s.io",
                topic="/tasks/exit",
                event=Any(type_url="containerd.events.TaskExit", value=EXIT),
            )
        ),
        b"\x0a\x44"  # 8 + 13 + 2 + 45 bytes
        b"\x12\x06k8s.io"
        b"\x1a\x0b/tasks/exit"
        b"\x22\x2d\x0a\x1acontainerd.events.TaskExit\x12\x0f" + EXIT,
    ),
    "runc options skip number 8": (
        runc_options_pb2.Options(root="/r", systemd_cgroup=True),
        b"\x3a\x02/r\x48\x01",
    ),
    "runtime options": (
        runtimeoptions_pb2.Options(config_path="/c", config_body=b"x"),
        b"\x12\x02/c\x1a\x01x",
    ),
    "sandbox": (
        sandbox_pb2.CreateSandboxRequest(sandbox_id="s", netns_path="/n", annotations={"k": "v"}),
        b"\x0a\x01s\x2a\x02/n\x32\x06\x0a\x01k\x12\x01v",
    ),
    "cgroup v1": (
        cgroups_v1_pb2.Metrics(
            memory=cgroups_v1_pb2.MemoryStat(usage=cgroups_v1_pb2.MemoryEntry(usage=300)),
            cpu=cgroups_v1_pb2.CPUStat(usage=cgroups_v1_pb2.CPUUsage(per_cpu=[1, 2])),
        ),
        b"\x1a\x06\x0a\x04\x22\x02\x01\x02\x22\x06\x8a\x02\x03\x10\xac\x02",
    ),
    "cgroup v2 has doubles": (
        cgroups_v2_pb2.Metrics(
            cpu=cgroups_v2_pb2.CPUStat(psi=cgroups_v2_pb2.PSIStats(some=cgroups_v2_pb2.PSIData(avg10=1.0)))
        ),
        b"\x12\x0d\x3a\x0b\x0a\x09\x09\x00\x00\x00\x00\x00\x00\xf0\x3f",
    ),
}


@pytest.mark.parametrize(("message", "wire"), CASES.values(), ids=CASES)
def test_literal_bytes(message: Message, wire: bytes) -> None:
    assert message.SerializeToString(deterministic=True) == wire
    assert type(message).FromString(wire) == message


def test_options_read_as_bootstrap_params_show_in_id_and_namespace() -> None:
    """Both are two leading strings on the wire, so only the values tell which one stdin holds."""
    options = Any(type_url="runtimeoptions.v1.Options", value=b"/etc/c").SerializeToString()
    params = bootstrap_pb2.BootstrapParams.FromString(options)
    assert (params.instance_id, params.namespace) == ("runtimeoptions.v1.Options", "/etc/c")


def test_text_addresses_are_no_bootstrap_result() -> None:
    for text in (b"unix:///run/s", b'{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}'):
        with pytest.raises(DecodeError):
            bootstrap_pb2.BootstrapResult.FromString(text)


@pytest.mark.parametrize("name", sorted(task_v2_pb2.DESCRIPTOR.message_types_by_name))
def test_task_versions_differ_in_the_package_only(name: str) -> None:
    def shape(module: object) -> list[tuple[str, int, int, bool]]:
        descriptor = getattr(module, name).DESCRIPTOR
        return [(field.name, field.number, field.type, field.is_repeated) for field in descriptor.fields]

    assert shape(task_v2_pb2) == shape(task_v3_pb2)

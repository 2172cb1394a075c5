"""Bytes on the wire, written by hand from the protobuf encoding and the numbers in the tables.

A key is `number << 3 | kind`; kind 0 is a varint, 2 is a length and that many bytes. A negative number is ten
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import csi_pb2, health_pb2, oci_pb2, types_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

MINUS_ONE = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"

CASES = {
    "container with an OCI spec": (
        pb.CreateContainerRequest(
            container_id="c1",
            OCI=oci_pb2.Spec(
                Version="1.2",
                Process=oci_pb2.Process(Terminal=True, User=oci_pb2.User(UID=7), Args=["sh"]),
                Annotations={"k": "v"},
            ),
            sandbox_pidns=True,
        ),
        (
            b"\x0a\x02c1"
            b"\x32\x19"  # OCI: 5 + 12 + 8 bytes
            b"\x0a\x031.2"
            b"\x12\x0a\x08\x01\x1a\x02\x08\x07\x22\x02sh"
            b"\x3a\x06\x0a\x01k\x12\x01v"
            b"\x38\x01"
        ),
    ),
    "storage with a group": (
        pb.Storage(
            driver="blk",
            options=["ro"],
            fs_group=pb.FSGroup(group_id=5, group_change_policy=types_pb2.OnRootMismatch),
            shared=True,
        ),
        b"\x0a\x03blk\x2a\x02ro\x3a\x04\x10\x05\x18\x01\x40\x01",
    ),
    "unlimited memory": (oci_pb2.LinuxMemory(Limit=-1, Swappiness=60), b"\x08" + MINUS_ONE + b"\x30\x3c"),
    "repeated numbers are packed": (pb.AddSwapRequest(PCIPath=[2, 1]), b"\x0a\x02\x02\x01"),
    "entropy is field 2": (pb.ReseedRandomDevRequest(data=b"\x00\xff"), b"\x12\x02\x00\xff"),
    "set to false is not unset": (
        pb.MemAgentCompactConfig(disabled=False, compact_order=9),
        b"\x08\x00\x30\x09",
    ),
    "a seccomp errno of 0 is sent": (oci_pb2.LinuxSyscall(Names=["x"], errnoret=0), b"\x0a\x01x\x18\x00"),
    "wait": (pb.WaitProcessRequest(container_id="c1", exec_id="e"), b"\x0a\x02c1\x12\x01e"),
    "exit status may be negative": (pb.WaitProcessResponse(status=-1), b"\x08" + MINUS_ONE),
    "end of output is an empty reply": (pb.ReadStreamResponse(data=b""), b""),
    "interface": (
        types_pb2.Interface(
            name="eth0",
            IPAddresses=[types_pb2.IPAddress(family=types_pb2.v6, address="::1", mask="128")],
            mtu=1500,
            raw_flags=0x80,
        ),
        b"\x12\x04eth0\x1a\x0c\x08\x01\x12\x03::1\x1a\x03128\x20\xdc\x0b\x40\x80\x01",
    ),
    "huge pages by size": (
        pb.CgroupStats(hugetlb_stats={"2MB": pb.HugetlbStats(usage=1)}),
        b"\x2a\x09\x0a\x032MB\x12\x02\x08\x01",
    ),
    "volume": (
        csi_pb2.VolumeStatsResponse(usage=[csi_pb2.VolumeUsage(total=300, unit=csi_pb2.VolumeUsage.INODES)]),
        b"\x0a\x05\x10\xac\x02\x20\x02",
    ),
    "serving": (health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING), b"\x08\x01"),
}


@pytest.mark.parametrize(("message", "wire"), CASES.values(), ids=CASES)
def test_literal_bytes(message: Message, wire: bytes) -> None:
    assert message.SerializeToString(deterministic=True) == wire
    assert type(message).FromString(wire) == message


def test_unpacked_numbers_are_read_too() -> None:
    assert list(pb.AddSwapRequest.FromString(b"\x08\x02\x08\x01").PCIPath) == [2, 1]


def test_field_of_a_newer_agent_survives() -> None:
    wire = b"\x08\x01\x98\x06\x07"  # field 1, then a field 99 that nobody here knows
    reply = pb.GuestDetailsResponse.FromString(wire)
    assert reply.mem_block_size_bytes == 1
    assert reply.SerializeToString() == wire


def test_number_of_a_newer_enum_survives() -> None:
    reply = health_pb2.HealthCheckResponse.FromString(b"\x08\x09")
    assert reply.status == 9

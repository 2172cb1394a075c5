"""Root file systems in layers, as Kata's runtime asks for them."""

from __future__ import annotations

import pytest

from agent_proto.gen import agent_pb2 as pb
from guest_agent.errors import InvalidRequest, NotSupported
from guest_agent.layers import FOLDER, spread

MARK = "X-kata.multi-layer=true"


def lower(source: str, *options: str, place: str = "/root") -> pb.Storage:
    return pb.Storage(
        driver="blk",
        source=source,
        fstype="erofs",
        mount_point=place,
        options=[MARK, "X-kata.overlay-lower", *options],
    )


def upper(*options: str) -> pb.Storage:
    marks = [MARK, "X-kata.overlay-upper", "X-kata.mkdir.path={{ mount 0 }}/upper:0755"]
    return pb.Storage(
        driver="blk", source="/dev/vda", fstype="ext4", mount_point="/root", options=[*marks, *options]
    )


def test_layers_and_what_is_written() -> None:
    other = pb.Storage(driver="local", mount_point="/other")
    numbered = ("X-kata.gpt-partitioned=true", "X-kata.partition-number=2", "ro")
    below = [lower("/dev/vdb"), lower("/dev/vdc", *numbered), lower("/dev/nvme0n1", *numbered)]
    spreaded = spread([upper("rw"), *below, other], "c")
    assert [(s.driver, s.source, s.fstype, s.mount_point, list(s.options)) for s in spreaded[:4]] == [
        ("blk", "/dev/vdb", "erofs", f"{FOLDER}/c.0", ["ro"]),
        ("blk", "/dev/vdc2", "erofs", f"{FOLDER}/c.1", ["ro"]),
        ("blk", "/dev/nvme0n1p2", "erofs", f"{FOLDER}/c.2", ["ro"]),
        ("blk", "/dev/vda", "ext4", f"{FOLDER}/c.upper", ["rw"]),
    ]
    overlay, rest = spreaded[4:]
    assert rest == other
    assert (overlay.driver, overlay.fstype, overlay.mount_point) == ("overlayfs", "overlay", "/root")
    assert list(overlay.options) == [
        "lowerdir=" + ":".join(f"{FOLDER}/c.{number}" for number in range(3)),
        f"upperdir={FOLDER}/c.upper/upper",
        f"workdir={FOLDER}/c.upper/work",
    ]


def test_without_a_disk_to_write_to_it_is_memory() -> None:
    _, memory, overlay = spread([lower("/dev/vda")], "c")
    assert (memory.driver, memory.fstype, memory.mount_point) == ("ephemeral", "tmpfs", f"{FOLDER}/c.upper")
    assert overlay.mount_point == "/root"


@pytest.mark.parametrize(
    ("storages", "kind", "message"),
    [
        ([upper()], InvalidRequest, "0 read-only layers and 1 writable"),
        ([upper(), upper(), lower("/dev/a")], InvalidRequest, "1 read-only layers and 2 writable"),
        ([lower("/dev/a"), lower("/dev/b", place="/x")], InvalidRequest, "for 2 mount points"),
        ([lower("/dev/a")] * 501, InvalidRequest, "501 read-only layers"),
        ([lower("/dev/a", "X-kata.gpt-partitioned=true")], InvalidRequest, "'' is no number of a partition"),
        (
            [lower("/dev/a", "X-kata.gpt-partitioned=true", "X-kata.partition-number=../x")],
            InvalidRequest,
            "no number",
        ),
        (
            [lower("/dev/a", "X-kata.dmverity-enabled=true")],
            NotSupported,
            "the option X-kata.dmverity-enabled",
        ),
        ([lower("/dev/a", "X-kata.mkdir.path=/etc:0777")], NotSupported, "a directory '/etc' in its layers"),
        (
            [pb.Storage(mount_point="/x", options=["X-kata.other"])],
            NotSupported,
            "/x: the option X-kata.other",
        ),
    ],
)
def test_what_is_refused(storages: list[pb.Storage], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        spread(storages, "c")
    assert message in str(caught.value)

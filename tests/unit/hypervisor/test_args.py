"""QEMU's property syntax, and that no value can break out of its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidSpec
from hypervisor.qemu import args


@dataclass(frozen=True, kw_only=True)
class Sample(args.Props):
    some_flag: bool | None = None
    size: str | None = None
    count: int | None = None


@pytest.mark.parametrize(
    ("props", "joined"),
    [
        (Sample(), "thing"),
        (Sample(some_flag=True), "thing,some-flag=on"),
        (Sample(some_flag=False, count=0), "thing,some-flag=off,count=0"),
        (Sample(size="1,evil=on"), "thing,size=1,,evil=on"),
        (Sample(size=""), "thing,size="),
    ],
)
def test_join_props(props: Sample, joined: str) -> None:
    assert args.join_props("thing", props) == joined


def test_raw_properties_keep_their_commas_and_come_last() -> None:
    assert args.join_props("a,b", Sample(count=2), raw="x=1,y=2") == "a,,b,count=2,x=1,y=2"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_line_breaks_and_nul_are_refused_everywhere(bad: str) -> None:
    switches: list[args.Switch] = [
        args.Name(bad),
        args.Kernel(Path(bad)),
        args.Initrd(Path(bad)),
        args.Append(bad),
        args.Bios(Path(bad)),
        args.Sandbox(bad),
        args.Machine(type="q35", raw=bad, memory_backend="mem"),
        args.Cpu(model=bad),
        args.Cpu(model="host", raw=bad),
        args.VhostUserFs(driver="vhost-user-fs-pci", chardev="fs0", tag=bad, queue_size=1024),
        args.BlockdevFile(node_name="rootfs", filename=Path(bad)),
    ]
    for switch in switches:
        with pytest.raises(InvalidSpec, match="line break or NUL"):
            switch.argv()


@given(st.text(alphabet=st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])))
def test_a_value_stays_one_property(value: str) -> None:
    """Read back as QEMU does: a doubled comma is a comma, a single one ends the property."""
    joined = args.join_props("x", Sample(size=value, count=7))
    properties = [p.replace("\0", ",") for p in joined.replace(",,", "\0").split(",")]
    assert properties == ["x", f"size={value}", "count=7"]

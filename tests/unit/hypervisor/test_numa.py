"""The guest's NUMA nodes: what of the host they come from, and how memory and processors are divided."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hypervisor.errors import HostUnsupported, InvalidSpec
from hypervisor.host import Host
from hypervisor.numa import guest_nodes
from hypervisor.qemu.cmdline import build_cmdline
from hypervisor.qemu.numa import divided
from hypervisor.spec import NumaNode
from tests.unit.hypervisor.test_golden import GOLDEN, read_case

if TYPE_CHECKING:
    from pathlib import Path

TWO = {0: "10 21", 1: "21 10"}
# Node 1 is offline, 3 has processors only.
FOUR = {0: "10 20 40", 2: "20 10 31", 3: "40 31 10"}


def host(root: Path, rows: dict[int, str], memory: str) -> Host:
    folder = root / "sys/devices/system/node"
    folder.mkdir(parents=True)
    (folder / "online").write_text(",".join(map(str, rows)) + "\n")
    (folder / "has_memory").write_text(f"{memory}\n")
    for number, row in rows.items():
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}/distance").write_text(f"{row}\n")
    return Host(root=root)


def test_one_for_each_of_the_hosts(tmp_path: Path) -> None:
    assert guest_nodes((), host(tmp_path, TWO, "0-1")) == (
        NumaNode(host_nodes=(0,), distances=(10, 21)),
        NumaNode(host_nodes=(1,), distances=(21, 10)),
    )


def test_a_host_with_one_node_has_nothing_to_tell(tmp_path: Path) -> None:
    assert guest_nodes((), host(tmp_path, {0: "10"}, "0")) == ()
    assert guest_nodes((), Host(root=tmp_path / "no-sysfs")) == ()


def test_nodes_that_are_away_and_nodes_without_memory(tmp_path: Path) -> None:
    four = host(tmp_path, FOUR, "0,2")
    assert [node.host_nodes for node in guest_nodes((), four)] == [(0,), (2,)]
    assert [node.distances for node in guest_nodes((), four)] == [(10, 20), (20, 10)]
    with pytest.raises(
        HostUnsupported,
        match=r"node 3 of this host: its nodes with memory are 0, 2; correct numa_mapping",
    ):
        guest_nodes([(0,), (3,)], four)


def test_what_is_configured(tmp_path: Path) -> None:
    two = host(tmp_path, TWO, "0-1")
    assert guest_nodes([(0, 1)], two) == (NumaNode(host_nodes=(0, 1), distances=(10,)),)
    # Two nodes of the guest in one of the host are as near as a table may say.
    assert [node.distances for node in guest_nodes([(0,), (0,), (1,)], two)] == [
        (10, 11, 21),
        (11, 10, 21),
        (21, 21, 10),
    ]


def test_a_host_that_does_not_tell_distances(tmp_path: Path) -> None:
    two = host(tmp_path, TWO, "0-1")
    (tmp_path / "sys/devices/system/node/node1/distance").write_text("what?\n")
    assert [node.distances for node in guest_nodes((), two)] == [(10, 21), (11, 10)]


@pytest.mark.parametrize(
    ("memory", "nodes", "sizes"),
    [
        (2048, 2, [1024, 1024]),
        (2048, 3, [768, 640, 640]),
        (256, 2, [128, 128]),
        (250, 2, [126, 124]),
        (100, 3, [36, 32, 32]),
    ],
)
def test_memory_is_divided_into_blocks(memory: int, nodes: int, sizes: list[int]) -> None:
    assert divided(memory, nodes) == sizes
    assert sum(sizes) == memory


def test_too_little_for_so_many() -> None:
    with pytest.raises(InvalidSpec, match=r"64 MiB are too little for 3 NUMA nodes of 32 MiB or more; raise"):
        divided(64, 3)


def test_a_machine_without_nodes() -> None:
    spec, fds = read_case(GOLDEN / "s390x" / "tcg.toml")
    with pytest.raises(InvalidSpec, match="s390x guests have no NUMA nodes; remove enable_numa"):
        build_cmdline(replace(spec, numa=(NumaNode(),)), fds)

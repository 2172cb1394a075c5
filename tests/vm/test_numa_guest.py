"""A guest with two NUMA nodes: it knows which memory and processors are near each other, and QEMU binds the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from hypervisor.spec import NumaNode
from tests.vm.guest import FOREIGN, MARKS, OWN, Guest, running_guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = MARKS

NODES = (
    NumaNode(host_nodes=(0,), distances=(10, 21)),
    NumaNode(host_nodes=(0,), distances=(21, 10)),
)
FOLDER = "/sys/devices/system/node"


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(software, id=software.arch) for software in (OWN, FOREIGN[0])],
)
async def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Guest]:
    changed = {"numa": NODES, "vcpus": 2}
    directory = tmp_path_factory.mktemp("guest")
    async with running_guest(directory, software=request.param, changed=changed) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb1"))
        yield running


async def test_the_guest_knows_its_nodes(guest: Guest) -> None:
    script = f"cd {FOLDER} && cat online node0/cpulist node1/cpulist node0/distance node1/distance"
    code, text = await guest.result("sh", "-c", f"{script} && cat node0/meminfo node1/meminfo")
    assert code == 0, text
    online, first, second, *distances = text.decode().splitlines()[:5]
    assert (online, first, second) == ("0-1", "0", "1")
    assert [row.split() for row in distances] == [["10", "21"], ["21", "10"]]
    totals = [int(line.split()[3]) for line in text.decode().splitlines() if "MemTotal" in line]
    # The kernel itself is in one of them.
    assert len(totals) == 2
    assert all(64 << 10 < total <= 128 << 10 for total in totals)


async def test_their_memory_is_bound_to_the_hosts(guest: Guest) -> None:
    answer = await guest.machine.monitor.execute("query-memdev")
    assert isinstance(answer, list)
    seen = {entry["id"]: (entry["size"], entry["policy"], entry["host-nodes"]) for entry in answer}
    assert seen == {"mem0": (128 << 20, "bind", [0]), "mem1": (128 << 20, "bind", [0])}

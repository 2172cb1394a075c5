"""The verbs that only look or adjust: Stats, Update, Pids, Connect, Shutdown; and both versions of the API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any as ProtoAny

from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2, runc_options_pb2
from tests.support import host
from tests.support.bundles import shell, spec

if TYPE_CHECKING:
    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim


async def test_stats(agent: FakeAgent, shim: Shim) -> None:
    cpu = agent.stats.cgroup_stats.cpu_stats.cpu_usage
    cpu.total_usage, cpu.usage_in_kernelmode, cpu.usage_in_usermode = 3_000_000, 1_000_000, 2_000_000
    agent.stats.cgroup_stats.memory_stats.usage.usage = 4096
    stats = (await shim.call("Stats")).stats
    if stats.type_url == "io.containerd.cgroups.v1.Metrics":
        v1 = cgroups_v1_pb2.Metrics.FromString(stats.value)
        assert (v1.cpu.usage.total, v1.cpu.usage.kernel, v1.cpu.usage.user) == (
            3_000_000,
            1_000_000,
            2_000_000,
        )
        assert v1.memory.usage.usage == 4096
    else:
        assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
        v2 = cgroups_v2_pb2.Metrics.FromString(stats.value)
        assert (v2.cpu.usage_usec, v2.cpu.system_usec, v2.cpu.user_usec) == (3000, 1000, 2000)
        assert v2.memory.usage == 4096


async def test_update(agent: FakeAgent, shim: Shim) -> None:
    resources = {
        "memory": {"limit": 64 << 20, "swap": -1},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-1"},
        "pids": {"limit": 5},
    }
    await shim.call("Update", resources=ProtoAny(value=json.dumps(resources).encode()))
    request = await agent.request("UpdateContainer")
    assert (request.container_id, request.resources.Memory.Limit, request.resources.Memory.Swap) == (
        shim.id,
        64 << 20,
        -1,
    )
    cpu = request.resources.CPU
    assert (cpu.Shares, cpu.Quota, cpu.Period) == (512, 50000, 100000)
    assert cpu.Cpus == ""  # the numbers of the host's processors mean nothing in the guest


async def test_pids(agent: FakeAgent, shim: Shim) -> None:
    """Those in the guest; what stands for the container on the host is the virtual machine."""
    await shim.exec("e", shell("exec sleep 100"))
    await shim.call("Start", exec_id="e")
    await shim.exec("f", shell("exit 0"))
    await shim.call("Start", exec_id="f")
    await shim.call("Wait", exec_id="f")
    processes = (await shim.call("Pids")).processes
    assert [process.pid for process in processes] == [
        agent.process(shim.id, exec_id).pid for exec_id in ("", "e")
    ]
    assert (await shim.call("State")).pid not in [process.pid for process in processes]
    assert not processes[0].HasField("info")
    details = runc_options_pb2.ProcessDetails.FromString(processes[1].info.value)
    assert (processes[1].info.type_url, details.exec_id) == ("containerd.runc.v1.ProcessDetails", "e")


async def test_connect(shim: Shim) -> None:
    reply = await shim.call("Connect")
    assert (reply.shim_pid, reply.task_pid) == (shim.pid, (await shim.call("State")).pid)
    assert host.is_running(reply.task_pid)
    assert reply.version != ""


async def test_shutdown_with_containers_does_nothing(shim: Shim) -> None:
    await shim.call("Shutdown")
    await shim.call("Shutdown", id="another")
    assert (await shim.call("State")).status == 2


async def test_both_versions_on_one_socket(containerd: FakeContainerd, shim: Shim) -> None:
    newer = await containerd.connect(shim.id, shim.bundle, shim.address, version=3)
    assert (await newer.call("State")).pid == (await shim.call("State")).pid
    assert newer.pid == shim.pid


async def test_shutdown_without_containers(containerd: FakeContainerd, name: str) -> None:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exit 0"))))
    await shim.shutdown()

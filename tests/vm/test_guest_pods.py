"""Several containers in one booted guest: whose processes they see, and what the end of one means for the others."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import health_pb2, oci_pb2
from agent_proto.gen.kata_py_agent_pb2 import ListProcessesRequest, SignalContainerRequest
from tests.vm.guest import LOG_VPORT, MARKS, PATIENCE_S, ROOTFS, Guest, execute, running_guest, specification
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = MARKS

EXECS = 30
#: One after the other, half of them before the agent's figures are taken for the first time: up to then the interpreter
#: fills what it keeps for its next objects.
CONTAINERS = 500
#: Half of what as little as 6 KiB kept of each container would be: the functions that one seccomp filter needs.
GROWTH_KIB = CONTAINERS // 2 * 6 // 2


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    params = f"agent.log=debug agent.log_vport={LOG_VPORT}"
    async with running_guest(tmp_path_factory.mktemp("guest"), params) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(hostname="pod", sandbox_id="sb1"))
        yield running


async def member(guest: Guest, *args: str, kind: str = "container", shared: bool = False) -> str:
    """A running container as containerd's CRI plugin describes it."""
    container_id = guest.new_id()
    spec = specification(args)
    spec.Annotations["io.kubernetes.cri.container-type"] = kind
    request = pb.CreateContainerRequest(container_id=container_id, OCI=spec, sandbox_pidns=shared)
    await guest.agent.create_container(request)
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    return container_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pause(guest: Guest) -> AsyncIterator[str]:
    container_id = await member(guest, "sleep", "100000", kind="sandbox")
    yield container_id
    await guest.remove(container_id)


async def seen_by(guest: Guest, container_id: str, exec_id: str) -> list[str]:
    await execute(guest, container_id, exec_id, "ps", "-o", "args")
    text = (await guest.output(container_id, exec_id)).decode()
    assert await guest.wait(container_id, exec_id) == 0
    lines = [line.strip() for line in text.splitlines()[1:]]
    # The dead in brackets are those that a first process like `sleep` does not reap.
    return [line for line in lines if not line.startswith(("ps ", "["))]


async def pids(guest: Guest, container_id: str) -> list[tuple[int, str]]:
    answer = await guest.agent.list_processes(ListProcessesRequest(container_id=container_id))
    return [(process.pid, process.exec_id) for process in answer.processes]


async def test_containers_have_pid_namespaces_of_their_own_or_the_sandbox_containers(
    guest: Guest, pause: str
) -> None:
    alone = await member(guest, "sleep", "1111")
    first = await member(guest, "sleep", "2222", shared=True)
    second = await member(guest, "sleep", "3333", shared=True)
    assert await seen_by(guest, alone, "e") == ["sleep 1111"]
    assert await seen_by(guest, first, "e") == ["sleep 100000", "sleep 2222", "sleep 3333"]
    for container_id in (alone, first, second):
        await guest.remove(container_id)
    assert await seen_by(guest, pause, "e") == ["sleep 100000"]


async def test_the_init_of_a_shared_pid_namespace_takes_its_container_with_it(
    guest: Guest, pause: str
) -> None:
    going = await member(guest, "sh", "-c", "sleep 4444 & read forever", shared=True)
    staying = await member(guest, "sleep", "5555", shared=True)
    await execute(guest, going, "e", "sleep", "6666")
    await guest.kill(going, signal.SIGUSR1)
    assert await guest.wait(going) == 128 + signal.SIGUSR1
    assert await guest.wait(going, "e") == 137
    assert await guest.output(going) == b""
    assert await seen_by(guest, staying, "e") == ["sleep 100000", "sleep 5555"]
    again = await member(guest, "sleep", "7777", shared=True)
    await guest.remove(going)
    assert await seen_by(guest, again, "e") == ["sleep 100000", "sleep 5555", "sleep 7777"]
    for container_id in (staying, again):
        await guest.remove(container_id)


async def test_processes_are_listed_and_signalled(guest: Guest, pause: str) -> None:
    container_id = await member(guest, "sh", "-c", "sleep 1000 & echo up; exec tail -f /dev/null")
    request = pb.ReadStreamRequest(container_id=container_id, len=100)
    assert (await guest.agent.read_stdout(request)).data == b"up\n"
    await execute(guest, container_id, "e", "sh", "-c", "sleep 1002 & echo up; wait")
    request.exec_id = "e"
    assert (await guest.agent.read_stdout(request)).data == b"up\n"
    found = await pids(guest, container_id)
    assert len({pid for pid, _ in found}) == 4
    assert [exec_id for _, exec_id in found if exec_id] == ["e"]
    await guest.agent.signal_container(
        SignalContainerRequest(container_id=container_id, signal=signal.SIGTERM)
    )
    assert await guest.wait(container_id, "e") == 128 + signal.SIGTERM
    # The first process of a pid namespace gets no signal that it does not handle, but for SIGKILL.
    await guest.agent.signal_container(
        SignalContainerRequest(container_id=container_id, signal=signal.SIGKILL)
    )
    assert await guest.wait(container_id) == 128 + signal.SIGKILL
    assert await pids(guest, container_id) == []
    await guest.agent.signal_container(
        SignalContainerRequest(container_id=container_id, signal=signal.SIGKILL)
    )
    await guest.remove(container_id)
    assert len(await pids(guest, pause)) == 1


async def test_out_of_memory_is_told_before_the_exit_and_hurts_nobody_else(guest: Guest, pause: str) -> None:
    def small(spec: oci_pb2.Spec) -> None:
        spec.Linux.Resources.Memory.Limit = spec.Linux.Resources.Memory.Swap = 32 << 20

    order: list[str] = []

    async def out_of_memory() -> None:
        answer = await guest.agent.get_oom_event(pb.GetOOMEventRequest())
        order.append(f"oom {answer.container_id}")

    polling = asyncio.create_task(out_of_memory())
    container_id = await guest.run("tail", "/dev/zero", change=small)
    code = await guest.wait(container_id)
    order.append(f"exit {code}")
    await polling
    assert order == [f"oom {container_id}", "exit 137"]
    await guest.remove(container_id)
    assert await seen_by(guest, pause, "e") == ["sleep 100000"]
    assert await guest.result("ls", "/bin/busybox") == (0, b"/bin/busybox\n")

    # In a container whose init goes on: the exec's exit is what the report has to precede.
    order.clear()
    polling = asyncio.create_task(out_of_memory())
    container_id = await guest.run("sleep", "1000", change=small)
    await execute(guest, container_id, "e", "tail", "/dev/zero")
    code = await guest.wait(container_id, "e")
    order.append(f"exit {code}")
    await polling
    assert order == [f"oom {container_id}", "exit 137"]
    await guest.remove(container_id)


async def state_of(guest: Guest) -> str:
    """The guest's mounts, cgroups and directories as a container sees them; and the agent's open files."""

    def show(spec: oci_pb2.Spec) -> None:
        for name in ("/run", "/sys/fs/cgroup", "/proc"):
            spec.Mounts.add(
                destination=f"/tmp/{name[1:4]}", type="bind", source=name, options=["rbind", "ro"]
            )

    script = (
        "cd /tmp; ls run/kata-containers run/kata-py run/kata-py/containers; ls -d sys/kata/*/;"
        " ls pro/1/fd | while read x; do echo fd; done; while read a b rest; do echo $b; done < pro/1/mounts"
    )
    container_id = await guest.run("sh", "-c", script, change=show)
    text = (await guest.output(container_id)).decode().replace(container_id, "ID")
    assert await guest.wait(container_id) == 0
    await guest.remove(container_id)
    return text


async def test_fifty_failed_creates_leave_nothing(guest: Guest, pause: str) -> None:
    before = await state_of(guest)
    assert "fd\nfd" in before
    assert f"sys/kata/{pause}/" in before
    storage = pb.Storage(
        driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point="/run/kata-containers/sandbox/vol"
    )

    def no_such_program(spec: oci_pb2.Spec) -> None:
        spec.Process.Args[:] = ["/no/such/program"]

    def no_such_source(spec: oci_pb2.Spec) -> None:
        spec.Mounts.add(destination="/x", type="bind", source="/no/such/source", options=["rbind"])

    def no_such_cgroup(spec: oci_pb2.Spec) -> None:
        spec.Linux.Resources.CPU.Cpus = "77"

    def no_such_root(spec: oci_pb2.Spec) -> None:
        spec.Root.Path = "/no/such/root"

    def no_such_file_system(spec: oci_pb2.Spec) -> None:
        spec.Mounts.add(destination="/x", type="no-such-fs", source="x")

    wrong = (no_such_program, no_such_source, no_such_cgroup, no_such_root, no_such_file_system)
    for number in range(50):
        spec = specification(("true",))
        wrong[number % len(wrong)](spec)
        request = pb.CreateContainerRequest(container_id=f"bad{number}", OCI=spec, storages=[storage])
        with pytest.raises(RpcError) as caught:
            await guest.agent.create_container(request)
        assert caught.value.code in (Code.INTERNAL, Code.INVALID_ARGUMENT, Code.NOT_FOUND), caught.value
        assert "\n" not in caught.value.message
    assert await state_of(guest) == before


async def agents_figures(guest: Guest) -> dict[str, int]:
    """Of the first process its threads, memory (KiB) and children, and of the guest the control groups."""

    def show(spec: oci_pb2.Spec) -> None:
        for name in ("/sys/fs/cgroup", "/proc"):
            spec.Mounts.add(
                destination=f"/tmp/{name[1:4]}", type="bind", source=name, options=["rbind", "ro"]
            )

    script = "cd /tmp; cat pro/1/status sys/cgroup.stat; echo children: $(cat pro/1/task/*/children | wc -w)"
    code, text = await guest.result("sh", "-c", script, change=show)
    assert code == 0
    lines = [line.replace(":", "").split() for line in text.decode().splitlines()]
    wanted = ("Threads", "VmRSS", "nr_descendants", "children", "FDSize")
    return {words[0]: int(words[1]) for words in lines if words[0] in wanted}


@pytest.mark.timeout(400)
async def test_five_hundred_containers_leave_nothing(guest: Guest, pause: str) -> None:
    """One after the other, as a node that lives long sees them, with a terminal now and then, and an exec."""

    async def one(number: int) -> None:
        def change(spec: oci_pb2.Spec) -> None:
            spec.Process.Terminal = number % 4 == 0
            spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
            spec.Linux.Seccomp.Syscalls.add(Names=["acct"], Action="SCMP_ACT_ERRNO")

        container_id = await guest.run("sh", "-c", "sleep 1000", change=change)
        if number % 2:
            await execute(
                guest, container_id, "e", "sh", "-c", f"exit {number % 100}", terminal=number % 3 == 0
            )
            assert await guest.wait(container_id, "e") == number % 100
        await guest.kill(container_id, signal.SIGKILL)
        assert await guest.wait(container_id) == 128 + signal.SIGKILL
        await guest.remove(container_id)

    for number in range(CONTAINERS // 2):
        await one(number)
    state, before = await state_of(guest), await agents_figures(guest)
    for number in range(CONTAINERS // 2, CONTAINERS):
        await one(number)
    after = await agents_figures(guest)
    assert await state_of(guest) == state
    grown = {name: after[name] - before[name] for name in before}
    assert grown.pop("VmRSS") < GROWTH_KIB, grown
    assert grown == {"Threads": 0, "nr_descendants": 0, "children": 0, "FDSize": 0}


async def test_hooks_of_the_guest(guest: Guest) -> None:
    """The agent collects its children itself, those that are hooks too, and knows how they ended."""
    shell = f"{ROOTFS}/bin/busybox"
    log = "/run/hooks"

    def with_hooks(spec: oci_pb2.Spec) -> None:
        for name in ("Prestart", "CreateRuntime", "Poststart", "Poststop"):
            script = f"{shell} cat > {log}.{name}"
            getattr(spec.Hooks, name).add(Path=shell, Args=["sh", "-c", script], Timeout=PATIENCE_S)

    container_id = await guest.run("true", change=with_hooks)
    assert await guest.wait(container_id) == 0
    await guest.remove(container_id)

    def show(spec: oci_pb2.Spec) -> None:
        spec.Mounts.add(destination="/tmp/run", type="bind", source="/run", options=["rbind"])

    code, text = await guest.result(
        "sh", "-c", "cd /tmp/run; for x in hooks.*; do echo $x; cat $x; echo; done", change=show
    )
    assert code == 0
    words = text.decode().splitlines()
    states = {
        name.removeprefix("hooks."): json.loads(state)
        for name, state in zip(words[::2], words[1::2], strict=True)
    }
    assert {name: state["status"] for name, state in states.items()} == {
        "Prestart": "creating", "CreateRuntime": "creating", "Poststart": "running", "Poststop": "stopped",
    }  # fmt: skip
    assert {state["id"] for state in states.values()} == {container_id}


@pytest.mark.parametrize(
    ("script", "timeout_s", "problem"),
    [
        ("echo no such thing; exit 3", PATIENCE_S, "ended with status 3: no such thing"),
        ("sleep 1000", 1, "took longer"),
    ],
)
async def test_a_failed_hook_is_a_failed_create(
    guest: Guest, script: str, timeout_s: int, problem: str
) -> None:
    before = await state_of(guest)
    shell = f"{ROOTFS}/bin/busybox"

    def with_hook(spec: oci_pb2.Spec) -> None:
        words = ["sh", "-c", script.replace("sleep", f"exec {shell} sleep")]
        spec.Hooks.CreateRuntime.add(Path=shell, Args=words, Timeout=timeout_s)

    with pytest.raises(RpcError, match=f"createRuntime hook {shell} {problem}"):
        await guest.create("true", change=with_hook)
    assert await state_of(guest) == before


async def test_parallel_execs_leave_nothing_and_lose_no_exit_code(guest: Guest, pause: str) -> None:
    before = await state_of(guest)

    async def one(number: int) -> int:
        exec_id = f"many{number}"
        await execute(guest, pause, exec_id, "sh", "-c", f"echo {number}; exit {number}")
        assert await guest.output(pause, exec_id) == f"{number}\n".encode()
        assert await guest.output(pause, exec_id, stderr=True) == b""
        await guest.agent.close_stdin(pb.CloseStdinRequest(container_id=pause, exec_id=exec_id))
        return await guest.wait(pause, exec_id)

    assert await asyncio.gather(*map(one, range(EXECS))) == list(range(EXECS))
    assert await state_of(guest) == before
    assert len(await pids(guest, pause)) == 1


async def test_a_hostile_host_cannot_end_the_agent(guest: Guest) -> None:
    spec = specification(("true",))
    nul = specification(("true",))
    nul.Root.Path = "/run/\0"
    deep = specification(("x" * 300_000,))
    calls = [
        guest.agent.create_container(pb.CreateContainerRequest(container_id="h1", OCI=nul)),
        guest.agent.create_container(pb.CreateContainerRequest(container_id="h2", OCI=deep)),
        guest.agent.create_container(pb.CreateContainerRequest(container_id="../../etc", OCI=spec)),
        guest.agent.create_container(
            pb.CreateContainerRequest(
                container_id="h3",
                OCI=spec,
                storages=[pb.Storage(driver="ephemeral", fstype="\0", mount_point="/run/x")],
            )
        ),
        guest.agent.set_guest_date_time(pb.SetGuestDateTimeRequest(Sec=2**62, Usec=1)),
        guest.agent.copy_file(pb.CopyFileRequest(path="\0", file_size=-1, offset=-5, data=b"x")),
        guest.agent.reseed_random_dev(pb.ReseedRandomDevRequest(data=b"")),
        guest.agent.read_stdout(pb.ReadStreamRequest(container_id="none", len=2**32 - 1)),
        guest.agent.get_volume_stats(pb.VolumeStatsRequest(volume_guest_path="\0")),
        guest.agent.signal_container(SignalContainerRequest(container_id="none", signal=2**32 - 1)),
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RpcError)]
    assert [result.code for result in refused if "NUL" in result.message] == 3 * [Code.INVALID_ARGUMENT]
    for result in results:
        assert not isinstance(result, BaseException) or isinstance(result, RpcError), result
        if isinstance(result, RpcError):
            assert result.code not in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED), result
    assert (await guest.agent.check(health_pb2.CheckRequest())).status == 1
    assert await guest.result("true") == (0, b"")


async def test_a_pod_without_a_sandbox_container_shares_too(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        await guest.agent.create_sandbox(pb.CreateSandboxRequest(hostname="pod", sandbox_id="sb2"))
        await share_without_a_sandbox_container(guest)


async def share_without_a_sandbox_container(guest: Guest) -> None:
    first = await member(guest, "sleep", "1111", shared=True)
    second = await member(guest, "sh", "-c", "sleep 2222 & read forever", shared=True)
    seen = await seen_by(guest, first, "e")
    assert {"sleep 1111", "sleep 2222"} <= set(seen)
    assert len(seen) == 4
    await guest.kill(first, signal.SIGKILL)
    assert await guest.wait(first) == 137
    assert len(await seen_by(guest, second, "e")) == 3
    await execute(guest, second, "e1", "sh", "-c", "kill -INT 1; kill -TERM 1; kill -KILL 1")
    assert await guest.wait(second, "e1") == 0
    # Nothing of the agent's can be reached through the first process.
    await execute(guest, second, "e2", "ls", "/proc/1/root/", "/proc/1/fd/")
    assert b"kata" not in await guest.output(second, "e2")
    await guest.wait(second, "e2")
    for container_id in (first, second):
        await guest.remove(container_id)

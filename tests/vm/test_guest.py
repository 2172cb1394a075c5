"""The guest image, booted: our agent as PID 1 answers everything that a host asks while it runs containers.

One machine of each architecture serves the whole file.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import health_pb2, oci_pb2
from hypervisor.spec import Export, Share
from tests.vm.guest import (
    ALL,
    LOG_VPORT,
    MARKS,
    PATIENCE_S,
    VIRTIOFSD,
    Guest,
    Software,
    execute,
    running_guest,
    specification,
)  # fmt: skip
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = MARKS


@pytest.fixture(scope="module", params=ALL)
def software(request: pytest.FixtureRequest) -> Software:
    found: Software = request.param
    for path in (found.qemu, found.guest / "initrd.img", found.busybox):
        assert path.exists(), f"{path} is missing: run packaging/setup.sh tests, and make foreign"
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory, software: Software) -> AsyncIterator[Guest]:
    params = f"agent.log=debug agent.log_vport={LOG_VPORT}"
    directory = tmp_path_factory.mktemp("guest")
    async with running_guest(directory, params, software=software) as running:
        request = pb.CreateSandboxRequest(
            hostname="podname",
            sandbox_id="sb1",
            dns=["nameserver 192.0.2.53", ""],
            storages=[
                pb.Storage(
                    driver="ephemeral", source="shm", fstype="tmpfs", mount_point="/run/kata-containers/sandbox/shm",
                    options=["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"],
                ),
            ],
        )  # fmt: skip
        await running.agent.create_sandbox(request)
        yield running


# The machine and the agent itself


async def test_it_tells_when_it_is_ready(guest: Guest) -> None:
    assert 0 < guest.ready["init_s"] <= guest.ready["ready_s"]


async def test_health(guest: Guest, software: Software) -> None:
    answer = await guest.agent.check(health_pb2.CheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    version = await guest.agent.version(health_pb2.CheckRequest())
    assert (
        version.agent_version == json.loads((software.guest / "manifest.json").read_text())["agent_version"]
    )


async def test_details(guest: Guest, software: Software) -> None:
    details = await guest.agent.get_guest_details(
        pb.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
    )
    assert details.agent_details.init_daemon
    assert {"virtio-fs", "ephemeral", "overlayfs"} <= set(details.agent_details.storage_handlers)
    block_mib = {"x86_64": 128, "aarch64": 128, "s390x": 256}[software.arch]
    assert details.mem_block_size_bytes == block_mib * 1024 * 1024


async def test_what_is_missing_is_unimplemented_by_name(guest: Guest) -> None:
    with pytest.raises(RpcError, match="SetPolicy") as caught:
        await guest.agent.set_policy(pb.SetPolicyRequest(policy="x"))
    assert caught.value.code == Code.UNIMPLEMENTED


async def test_a_second_sandbox_is_refused(guest: Guest) -> None:
    with pytest.raises(RpcError, match="sandbox sb1 already") as caught:
        await guest.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="other"))
    assert caught.value.code == Code.ALREADY_EXISTS


async def test_the_clock_can_be_set(guest: Guest) -> None:
    await guest.agent.set_guest_date_time(pb.SetGuestDateTimeRequest(Sec=4_000_000_000, Usec=5))
    code, text = await guest.result("date", "+%s")
    assert code == 0
    assert 4_000_000_000 <= int(text) < 4_000_000_100
    with pytest.raises(RpcError, match="no time of day") as caught:
        await guest.agent.set_guest_date_time(pb.SetGuestDateTimeRequest(Sec=1, Usec=1_000_000))
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_entropy_is_taken(guest: Guest) -> None:
    await guest.agent.reseed_random_dev(pb.ReseedRandomDevRequest(data=b"x" * 512))


async def test_all_processors_are_online(guest: Guest) -> None:
    await guest.agent.online_cpu_mem(pb.OnlineCPUMemRequest(wait=True, nb_cpus=1, cpu_only=False))
    with pytest.raises(RpcError) as caught:
        await guest.agent.online_cpu_mem(pb.OnlineCPUMemRequest(wait=True, nb_cpus=7))
    assert caught.value.code == Code.DEADLINE_EXCEEDED


async def test_metrics(guest: Guest) -> None:
    text = (await guest.agent.get_metrics(pb.GetMetricsRequest())).metrics
    assert 'kata_guest_meminfo{item="MemTotal"}' in text


async def test_copied_files(guest: Guest) -> None:
    base = "/run/kata-containers/shared/containers"
    path = f"{base}/sub/hello"

    async def piece(offset: int, data: bytes) -> None:
        await guest.agent.copy_file(
            pb.CopyFileRequest(
                path=path,
                file_size=10,
                file_mode=stat.S_IFREG | 0o640,
                dir_mode=0o750,
                offset=offset,
                data=data,
            )
        )

    await piece(0, b"01234")
    await piece(5, b"56789")

    def show(spec: oci_pb2.Spec) -> None:
        spec.Mounts.add(destination="/mnt", type="bind", source=base, options=["rbind", "ro"])

    assert await guest.result("sh", "-c", "cat /mnt/sub/hello; stat -c %a /mnt/sub/hello", change=show) == (
        0,
        b"0123456789640\n",
    )
    with pytest.raises(RpcError, match="not a path below") as caught:
        await guest.agent.copy_file(pb.CopyFileRequest(path=f"{base}/../../x", file_mode=stat.S_IFDIR))
    assert caught.value.code == Code.INVALID_ARGUMENT


# The life of a container


async def test_output_and_exit_code(guest: Guest) -> None:
    container_id = await guest.run("sh", "-c", "echo out; echo err >&2; exit 3")
    assert await guest.output(container_id) == b"out\n"
    assert await guest.output(container_id, stderr=True) == b"err\n"
    assert await guest.wait(container_id) == 3
    assert await guest.wait(container_id) == 3
    await guest.remove(container_id)
    with pytest.raises(RpcError) as caught:
        await guest.wait(container_id)
    assert caught.value.code == Code.NOT_FOUND


async def test_nothing_runs_before_start(guest: Guest) -> None:
    container_id = await guest.create("sh", "-c", "echo started")
    reading = asyncio.create_task(guest.output(container_id))
    await guest.agent.check(health_pb2.CheckRequest())
    assert not reading.done()
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    assert await reading == b"started\n"
    with pytest.raises(RpcError, match="started before") as caught:
        await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    assert caught.value.code == Code.FAILED_PRECONDITION
    await guest.remove(container_id)


async def test_a_created_container_can_be_removed(guest: Guest) -> None:
    await guest.remove(await guest.create("true"))


async def test_a_missing_program_is_one_clear_line(guest: Guest) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.create("nosuchprogram")
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert caught.value.message == 'exec: "nosuchprogram": executable file not found in $PATH'


@pytest.mark.parametrize("container_id", ["", "../up", "a/b", "-x", "x" * 300, "sandbox"])
async def test_bad_container_ids(guest: Guest, container_id: str) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.agent.create_container(
            pb.CreateContainerRequest(container_id=container_id, OCI=specification(("true",)))
        )
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_a_used_container_id(guest: Guest) -> None:
    container_id = await guest.create("true")
    with pytest.raises(RpcError) as caught:
        await guest.agent.create_container(
            pb.CreateContainerRequest(container_id=container_id, OCI=specification(("true",)))
        )
    assert caught.value.code == Code.ALREADY_EXISTS
    await guest.remove(container_id)


async def test_large_output_arrives_whole(guest: Guest) -> None:
    size = 3_000_000
    code, data = await guest.result(
        "sh", "-c", f"dd if=/dev/zero bs=100000 count={size // 100000} 2>/dev/null"
    )
    assert (code, len(data)) == (0, size)


async def test_stdin_reaches_the_process(guest: Guest) -> None:
    container_id = await guest.run("cat")
    data = bytes(range(256)) * 1200  # more than a pipe holds
    reading = asyncio.create_task(guest.output(container_id))
    written = await guest.agent.write_stdin(pb.WriteStreamRequest(container_id=container_id, data=data))
    assert written.len == len(data)
    await guest.agent.write_stdin(pb.WriteStreamRequest(container_id=container_id, data=b""))
    assert await reading == data
    assert await guest.wait(container_id) == 0
    await guest.remove(container_id)


async def test_close_stdin(guest: Guest) -> None:
    container_id = await guest.run("cat")
    await guest.agent.close_stdin(pb.CloseStdinRequest(container_id=container_id))
    assert await guest.wait(container_id) == 0
    with pytest.raises(RpcError, match="stdin is closed") as caught:
        await guest.agent.write_stdin(pb.WriteStreamRequest(container_id=container_id, data=b"x"))
    assert caught.value.code == Code.FAILED_PRECONDITION
    await guest.remove(container_id)


async def test_exit_is_not_the_end_of_the_pipes(guest: Guest, sleeper: str) -> None:
    """A process that an exec leaves behind keeps its pipe open after the exec's exit."""
    await execute(guest, sleeper, "early", "sh", "-c", "(sleep 2; echo late) & echo early")
    assert await guest.wait(sleeper, "early") == 0
    request = pb.ReadStreamRequest(container_id=sleeper, exec_id="early", len=100)
    assert (await guest.agent.read_stdout(request)).data == b"early\n"
    assert await guest.output(sleeper, "early") == b"late\n"


async def test_terminal(guest: Guest) -> None:
    def terminal(spec: oci_pb2.Spec) -> None:
        spec.Process.Terminal = True

    container_id = await guest.run("sh", "-c", "read line; echo got $line; stty size", change=terminal)
    await guest.agent.tty_win_resize(pb.TtyWinResizeRequest(container_id=container_id, row=33, column=101))
    await guest.agent.write_stdin(pb.WriteStreamRequest(container_id=container_id, data=b"abc\n"))
    assert await guest.output(container_id) == b"abc\r\ngot abc\r\n33 101\r\n"
    assert (await guest.agent.read_stderr(pb.ReadStreamRequest(container_id=container_id, len=1))).data == b""
    assert await guest.wait(container_id) == 0
    await guest.remove(container_id)


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("trap 'exit 7' TERM; echo on; while :; do sleep 0.1; done", signal.SIGTERM, 7),
        ("echo on; read forever", signal.SIGTERM, 137),  # the init does not handle it
        ("trap 'exit 9' USR1; echo on; while :; do sleep 0.1; done", signal.SIGUSR1, 9),
        ("trap '' TERM; echo on; while :; do sleep 0.1; done", signal.SIGKILL, 137),
    ],
)
async def test_signals(guest: Guest, script: str, number: int, code: int) -> None:
    container_id = await guest.run("sh", "-c", script)
    request = pb.ReadStreamRequest(container_id=container_id, len=100)
    assert (await guest.agent.read_stdout(request)).data == b"on\n"
    await guest.kill(container_id, number)
    assert await guest.wait(container_id) == code
    await guest.kill(container_id, signal.SIGKILL)  # gone already: that is what it wanted
    with pytest.raises(RpcError, match="has exited") as caught:
        await guest.kill(container_id, signal.SIGHUP)
    assert caught.value.code == Code.NOT_FOUND
    await guest.remove(container_id)


async def test_pause_and_resume(guest: Guest) -> None:
    container_id = await guest.run("sh", "-c", "while :; do echo x; sleep 0.1; done")
    pause, resume = (
        pb.PauseContainerRequest(container_id=container_id),
        pb.ResumeContainerRequest(container_id=container_id),
    )
    await guest.agent.pause_container(pause)
    with pytest.raises(RpcError, match="it is paused") as caught:
        await guest.agent.pause_container(pause)
    assert caught.value.code == Code.FAILED_PRECONDITION
    with pytest.raises(RpcError, match="it is paused"):
        await execute(guest, container_id, "e", "true")
    await guest.agent.resume_container(resume)
    with pytest.raises(RpcError, match="it is running"):
        await guest.agent.resume_container(resume)
    await guest.agent.pause_container(pause)
    await guest.kill(container_id, signal.SIGKILL)  # reaches frozen processes
    assert await guest.wait(container_id) == 137
    await guest.remove(container_id)


# More processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sleeper(guest: Guest) -> AsyncIterator[str]:
    container_id = await guest.run("sleep", "100000")
    yield container_id
    await guest.remove(container_id)


async def test_exec(guest: Guest, sleeper: str) -> None:
    await execute(guest, sleeper, "e1", "sh", "-c", "echo hi; echo no >&2; cat; exit 5")
    await guest.agent.write_stdin(pb.WriteStreamRequest(container_id=sleeper, exec_id="e1", data=b"typed"))
    await guest.agent.close_stdin(pb.CloseStdinRequest(container_id=sleeper, exec_id="e1"))
    assert await guest.output(sleeper, "e1") == b"hi\ntyped"
    assert await guest.output(sleeper, "e1", stderr=True) == b"no\n"
    assert await guest.wait(sleeper, "e1") == 5


async def test_exec_before_the_start(guest: Guest) -> None:
    container_id = await guest.create("sh", "-c", "cat /tmp/made")
    await execute(guest, container_id, "e1", "sh", "-c", "echo before > /tmp/made; echo $$; sleep 1000")
    assert (
        await guest.agent.read_stdout(pb.ReadStreamRequest(container_id=container_id, exec_id="e1", len=100))
    ).data != b"1\n"
    await execute(guest, container_id, "e2", "sh", "-c", "exit 3")
    assert await guest.wait(container_id, "e2") == 3
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    assert await guest.output(container_id) == b"before\n"
    assert await guest.wait(container_id) == 0
    assert await guest.wait(container_id, "e1") == 137
    await guest.remove(container_id)


async def test_exec_ids(guest: Guest, sleeper: str) -> None:
    await execute(guest, sleeper, "twice", "sleep", "1000")
    with pytest.raises(RpcError) as caught:
        await execute(guest, sleeper, "twice", "true")
    assert caught.value.code == Code.ALREADY_EXISTS
    await guest.kill(sleeper, signal.SIGKILL, "twice")
    assert await guest.wait(sleeper, "twice") == 137
    await execute(guest, sleeper, "twice", "true")
    assert await guest.wait(sleeper, "twice") == 0
    with pytest.raises(RpcError, match="no process 'other'") as caught:
        await guest.wait(sleeper, "other")
    assert caught.value.code == Code.NOT_FOUND
    with pytest.raises(RpcError):
        await execute(guest, sleeper, sleeper, "true")


async def test_exec_with_terminal(guest: Guest, sleeper: str) -> None:
    await execute(guest, sleeper, "tty", "sh", "-c", "test -t 0 && test -t 2 && echo is a tty", terminal=True)
    assert await guest.output(sleeper, "tty") == b"is a tty\r\n"
    assert await guest.wait(sleeper, "tty") == 0


async def test_exec_of_a_missing_program(guest: Guest, sleeper: str) -> None:
    with pytest.raises(RpcError) as caught:
        await execute(guest, sleeper, "missing", "nosuchprogram")
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert caught.value.message == 'exec: "nosuchprogram": executable file not found in $PATH'


async def test_many_execs_at_once(guest: Guest, sleeper: str) -> None:
    async def one(index: int) -> tuple[bytes, int]:
        await execute(guest, sleeper, f"m{index}", "sh", "-c", f"echo {index}; exit {index}")
        return await guest.output(sleeper, f"m{index}"), await guest.wait(sleeper, f"m{index}")

    results = await asyncio.gather(*(one(index) for index in range(5)))
    assert results == [(f"{index}\n".encode(), index) for index in range(5)]


# What a container sees


async def test_it_shares_the_host_name(guest: Guest) -> None:
    assert await guest.result("hostname") == (0, b"podname\n")


async def test_its_first_process_is_pid_1(guest: Guest) -> None:
    assert await guest.result("sh", "-c", "echo $$") == (0, b"1\n")


async def test_resolv_conf(guest: Guest) -> None:
    def show(spec: oci_pb2.Spec) -> None:
        source = "/run/kata-containers/sandbox/resolv.conf"
        spec.Mounts.add(destination="/etc/resolv.conf", type="bind", source=source, options=["bind"])

    assert await guest.result("cat", "/etc/resolv.conf", change=show) == (0, b"nameserver 192.0.2.53\n")


async def test_shared_memory_has_the_size_asked_for(guest: Guest) -> None:
    def show(spec: oci_pb2.Spec) -> None:
        source = "/run/kata-containers/sandbox/shm"
        spec.Mounts.add(destination="/dev/shm", type="bind", source=source, options=["rbind"])

    code, text = await guest.result("sh", "-c", "df -k /dev/shm | tail -1; stat -c %a /dev/shm", change=show)
    assert code == 0
    assert text.split()[1] == b"1024"
    assert text.split()[-1] == b"1777"


async def test_user_and_environment(guest: Guest) -> None:
    def change(spec: oci_pb2.Spec) -> None:
        spec.Process.User.UID, spec.Process.User.GID = 1000, 1001
        spec.Process.User.AdditionalGids.extend([5, 6])
        spec.Process.Env.append("GREETING=hello")
        spec.Process.Cwd = "/tmp"

    code, text = await guest.result("sh", "-c", "id -u; id -G; pwd; echo $GREETING", change=change)
    assert (code, text) == (0, b"1000\n1001 5 6\n/tmp\nhello\n")


async def test_sysctls_of_the_sandbox(guest: Guest) -> None:
    def change(spec: oci_pb2.Spec) -> None:
        spec.Linux.Sysctl["net.ipv4.ping_group_range"] = "0 1000"
        spec.Linux.Sysctl["kernel.shm_rmid_forced"] = "1"

    files = "/proc/sys/net/ipv4/ping_group_range", "/proc/sys/kernel/shm_rmid_forced"
    assert await guest.result("cat", *files, change=change) == (0, b"0\t1000\n1\n")

    def wrong(spec: oci_pb2.Spec) -> None:
        spec.Linux.Sysctl["net.no.such"] = "1"

    with pytest.raises(RpcError, match=r"sysctl net\.no\.such=1") as caught:
        await guest.create("true", change=wrong)
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_seccomp(guest: Guest) -> None:
    def change(spec: oci_pb2.Spec) -> None:
        spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
        spec.Linux.Seccomp.Syscalls.add(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=95)

    code, _ = await guest.result("sh", "-c", "mkdir /tmp/x 2>/dev/null; test ! -d /tmp/x", change=change)
    assert code == 0


async def test_limits_updates_and_statistics(guest: Guest) -> None:
    def change(spec: oci_pb2.Spec) -> None:
        spec.Linux.Resources.Memory.Limit = 64 << 20
        spec.Linux.Resources.Pids.Limit = 50

    container_id = await guest.run("sleep", "1000", change=change)
    request = pb.StatsContainerRequest(container_id=container_id)
    stats = (await guest.agent.stats_container(request)).cgroup_stats
    assert stats.memory_stats.usage.limit == 64 << 20
    assert 0 < stats.memory_stats.usage.usage < 64 << 20
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (1, 50)
    assert stats.cpu_stats.cpu_usage.total_usage > 0
    network = (await guest.agent.stats_container(request)).network_stats
    assert "lo" not in [interface.name for interface in network]
    resources = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Limit=32 << 20))
    await guest.agent.update_container(
        pb.UpdateContainerRequest(container_id=container_id, resources=resources)
    )
    stats = (await guest.agent.stats_container(request)).cgroup_stats
    assert stats.memory_stats.usage.limit == 32 << 20
    await guest.remove(container_id)


async def test_out_of_memory_is_reported(guest: Guest) -> None:
    def change(spec: oci_pb2.Spec) -> None:
        spec.Linux.Resources.Memory.Limit = 16 << 20
        spec.Linux.Resources.Memory.Swap = 16 << 20

    waiting = asyncio.create_task(guest.agent.get_oom_event(pb.GetOOMEventRequest()))
    container_id = await guest.run("tail", "/dev/zero", change=change)
    assert await guest.wait(container_id) == 137
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting).container_id == container_id
    await guest.remove(container_id)


async def test_storages_live_as_long_as_their_container(guest: Guest) -> None:
    path = "/run/kata-containers/sandbox/ephemeral/vol"
    storage = pb.Storage(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        mount_point=path,
        options=["size=64k", "fsgid=123"],
    )

    async def run(script: str) -> tuple[int, bytes]:
        container_id = guest.new_id()
        spec = specification(("sh", "-c", script))
        spec.Mounts.add(destination="/vol", type="bind", source=path, options=["rbind"])
        await guest.agent.create_container(
            pb.CreateContainerRequest(container_id=container_id, OCI=spec, storages=[storage])
        )
        await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
        text = await guest.output(container_id)
        code = await guest.wait(container_id)
        await guest.remove(container_id)
        return code, text

    assert await run("stat -c '%g %a' /vol; touch /vol/file") == (0, b"123 2775\n")
    assert await run("ls /vol") == (0, b"")
    unknown = pb.CreateContainerRequest(
        container_id=guest.new_id(),
        OCI=specification(("true",)),
        storages=[storage, pb.Storage(driver="floppy", mount_point="/x")],
    )
    with pytest.raises(RpcError, match="floppy") as caught:
        await guest.agent.create_container(unknown)
    assert caught.value.code == Code.UNIMPLEMENTED
    assert (
        await guest.result("cat", "/proc/mounts")
        and path.encode() not in (await guest.result("cat", "/proc/mounts"))[1]
    )


async def test_one_container_does_not_wait_for_another(guest: Guest) -> None:
    """Health is answered while a container is being made."""
    making = asyncio.create_task(guest.create("true"))
    started = time.monotonic()
    await guest.agent.check(health_pb2.CheckRequest())
    elapsed_s = time.monotonic() - started
    assert not making.done()
    assert elapsed_s < PATIENCE_S
    await guest.remove(await making)


async def test_the_log_tells_what_happened(guest: Guest) -> None:
    loop = asyncio.get_running_loop()
    with await guest.machine.vsock.connect(LOG_VPORT) as connection:
        text = b""
        async with asyncio.timeout(PATIENCE_S):
            while b"out_of_memory" not in text:
                text += await loop.sock_recv(connection, 65536)
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["msg"] == "agent_started"
    assert {line["level"] for line in lines} >= {"INFO", "DEBG", "WARN"}


async def test_nothing_is_left_behind(guest: Guest, sleeper: str) -> None:
    """After all of the above: the agent's processes, mounts and cgroups are those of the one container there is."""

    def show(spec: oci_pb2.Spec) -> None:
        for name, source in (("cgroup", "/sys/fs/cgroup/kata"), ("run", "/run")):
            spec.Mounts.add(destination=f"/mnt/{name}", type="bind", source=source, options=["rbind", "ro"])

    script = "ls /mnt/run/kata-containers /mnt/run/kata-py/containers; ls -d /mnt/cgroup/*/"
    container_id = await guest.run("sh", "-c", script, change=show)
    words = (await guest.output(container_id)).decode().split()
    await guest.remove(container_id)
    ours = {container_id, sleeper}
    assert {word for word in words if word.startswith("c")} == ours
    assert {word.split("/")[-2] for word in words if word.startswith("/mnt/cgroup/")} == ours


async def test_destroying_the_sandbox_ends_the_machine(tmp_path: Path, software: Software) -> None:
    async with running_guest(tmp_path, software=software) as guest:
        with pytest.raises(RpcError, match="no kernel module 'nosuchmodule'") as caught:
            await guest.agent.create_sandbox(
                pb.CreateSandboxRequest(kernel_modules=[pb.KernelModule(name="nosuchmodule")])
            )
        assert caught.value.code == Code.NOT_FOUND
        await guest.agent.create_sandbox(
            pb.CreateSandboxRequest(sandbox_id="sb2", kernel_modules=[pb.KernelModule(name="overlay")])
        )
        container_id = await guest.run("sleep", "1000")
        waiting = asyncio.create_task(guest.wait(container_id))
        await guest.agent.destroy_sandbox(pb.DestroySandboxRequest())
        with suppress(ConnectionClosed):
            assert await waiting == 137
        async with asyncio.timeout(PATIENCE_S):
            assert (await guest.machine.exited).status == 0


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="virtiofsd is not installed")
async def test_a_root_file_system_shared_by_the_host(tmp_path: Path, software: Software) -> None:
    rootfs = tmp_path / "shared" / "passthrough" / "c1" / "rootfs"
    for name in ("bin", "proc", "dev", "sys"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(software.busybox, rootfs / "bin" / "busybox")
    (rootfs / "bin" / "sh").symlink_to("busybox")
    share = Share(
        tag="kataShared",
        directory=tmp_path / "shared",
        daemon=VIRTIOFSD,
        extra_args=("--thread-pool-size=1", "-o", "announce_submounts"),
    )
    mount_point = "/run/kata-containers/shared/containers/"
    storage = pb.Storage(
        driver="virtio-fs", source="kataShared", fstype="virtiofs", options=["nodev"], mount_point=mount_point
    )
    shares: tuple[Share, ...] = (share,)
    exports: tuple[Export, ...] = ()
    if software.arch == "s390x":  # virtiofsd has another byte order
        shares, exports = (), (Export(tag=share.tag, directory=share.directory),)
        storage.driver = storage.fstype = "9p"
        storage.options[:] = ["nodev", "trans=virtio", "version=9p2000.L", "cache=mmap"]
    async with running_guest(tmp_path, shares=shares, exports=exports, software=software) as guest:
        await guest.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb3", storages=[storage]))

        def change(spec: oci_pb2.Spec) -> None:
            spec.Root.Path = f"{mount_point}passthrough/c1/rootfs"

        code, text = await guest.result("sh", "-c", "echo hello > /file; echo done", change=change)
        assert (code, text) == (0, b"done\n")
        assert (rootfs / "file").read_text() == "hello\n"
        statistics = await guest.agent.get_volume_stats(pb.VolumeStatsRequest(volume_guest_path=mount_point))
        assert statistics.usage[0].total > 0

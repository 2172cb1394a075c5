"""What a container's specification promises, seen from inside the container in a booted guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from tests.vm.guest import MARKS, Guest, execute, process, running_guest, specification
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = MARKS

SHM = "/run/kata-containers/sandbox/shm"
MIB = 1 << 20
SOME = ["CAP_CHOWN", "CAP_KILL"]
#: What a guest of these kernels knows, CAP_CHOWN to CAP_CHECKPOINT_RESTORE.
ALL_CAPABILITIES = 0x1FFFFFFFFFF


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    async with running_guest(tmp_path_factory.mktemp("guest")) as running:
        shm = pb.Storage(
            driver="ephemeral",
            source="shm",
            fstype="tmpfs",
            mount_point=SHM,
            options=["mode=1777", "size=2097152"],
        )
        request = pb.CreateSandboxRequest(
            hostname="pod-0",
            sandbox_id="sb1",
            dns=["search example.test", "nameserver 192.0.2.1"],
            storages=[shm],
        )
        await running.agent.create_sandbox(request)
        yield running


async def said(guest: Guest, spec: oci_pb2.Spec, script: str) -> str:
    """What a shell says on stdout in a container of the specification; it has to succeed."""
    spec.Process.Args[:] = ["sh", "-c", script]
    container_id = guest.new_id()
    await guest.agent.create_container(pb.CreateContainerRequest(container_id=container_id, OCI=spec))
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    text = (await guest.output(container_id)).decode()
    complaints = (await guest.output(container_id, stderr=True)).decode()
    assert (await guest.wait(container_id), complaints) == (0, "")
    await guest.remove(container_id)
    return text


def plain() -> oci_pb2.Spec:
    return specification(("true",))


async def test_user_groups_and_umask(guest: Guest) -> None:
    spec = plain()
    spec.Process.User.UID, spec.Process.User.GID = 1000, 2000
    spec.Process.User.AdditionalGids.extend([3000, 4000])
    spec.Process.User.Umask = 0o027
    assert await said(guest, spec, "id -u; id -G; umask") == "1000\n2000 3000 4000\n0027\n"


async def test_the_five_sets_of_capabilities(guest: Guest) -> None:
    spec = plain()
    sets = spec.Process.Capabilities
    for names in (sets.Bounding, sets.Permitted, sets.Effective, sets.Inheritable, sets.Ambient):
        names[:] = SOME
    text = await said(guest, spec, "cat /proc/self/status")
    found = {
        line.split()[0]: int(line.split()[1], 16) for line in text.splitlines() if line.startswith("Cap")
    }
    assert found == dict.fromkeys(("CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"), 1 << 0 | 1 << 5)
    sets.Clear()
    text = await said(guest, spec, "cat /proc/self/status")
    assert "CapEff:\t0000000000000000" in text


async def test_limits_of_the_process(guest: Guest) -> None:
    spec = plain()
    spec.Process.OOMScoreAdj = -998
    spec.Process.NoNewPrivileges = True
    spec.Process.Rlimits.add(Type="RLIMIT_CORE", Hard=20480, Soft=10240)
    text = await said(guest, spec, "cat /proc/self/oom_score_adj /proc/self/status; ulimit -c; ulimit -H -c")
    assert text.startswith("-998\n")
    assert "NoNewPrivs:\t1\n" in text
    assert text.endswith("\n20\n40\n")
    spec.Process.NoNewPrivileges = False
    spec.Process.OOMScoreAdj = 1000
    text = await said(guest, spec, "cat /proc/self/oom_score_adj /proc/self/status")
    assert text.startswith("1000\n")
    assert "NoNewPrivs:\t0\n" in text


async def test_seccomp_passes_over_names_it_does_not_know(guest: Guest) -> None:
    """containerd's default profile is an allow list that names calls newer than any guest's libseccomp."""
    spec = plain()
    seccomp = spec.Linux.Seccomp
    seccomp.DefaultAction = "SCMP_ACT_ALLOW"
    seccomp.Architectures.extend(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    seccomp.Syscalls.add(
        Names=["a_call_of_the_next_century", "mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=1
    )
    text = await said(guest, spec, "mkdir /tmp/x 2>/dev/null || echo refused; cat /proc/self/status")
    assert text.startswith("refused\n")
    assert "Seccomp:\t2\n" in text


async def test_a_root_and_paths_that_are_read_only_or_masked(guest: Guest) -> None:
    spec = plain()
    spec.Root.Readonly = True
    spec.Linux.MaskedPaths[:] = ["/proc/keys", "/proc/scsi", "/sys/firmware", "/no/such/path"]
    spec.Linux.ReadonlyPaths[:] = ["/proc/sys", "/proc/bus", "/no/such/path"]
    spec.Mounts.add(destination="/tmp", type="tmpfs", source="tmpfs", options=["nosuid", "size=64k"])
    script = (
        "touch /file 2>/dev/null || echo root; touch /tmp/file && echo tmp;"
        " echo 1 2>/dev/null > /proc/sys/kernel/panic || echo sys; cat /proc/keys; ls /proc/scsi /sys/firmware | cat"
    )
    text = await said(guest, spec, f"({script}) 2>/dev/null")
    assert text.startswith("root\ntmp\nsys\n")
    assert "keyring" not in text
    assert "acpi" not in text


async def test_a_privileged_container(guest: Guest) -> None:
    spec = plain()
    sets = spec.Process.Capabilities
    every = [name for name in capability_names() if name]
    for names in (sets.Bounding, sets.Permitted, sets.Effective):
        names[:] = every
    spec.Process.NoNewPrivileges = False
    del spec.Linux.MaskedPaths[:], spec.Linux.ReadonlyPaths[:]
    spec.Linux.Resources.Devices.add(Allow=True, Access="rwm")
    spec.Linux.Devices.add(Path="/dev/kmsg", Type="c", Major=1, Minor=11, FileMode=0o600)
    for mount in spec.Mounts:
        if mount.destination == "/sys":
            mount.options[:] = ["nosuid", "noexec", "nodev", "rw"]
    script = (
        "cat /proc/self/status; mkdir /tmp/m; mount -t tmpfs none /tmp/m && echo mounted;"
        " mknod /tmp/mem c 1 1 && dd if=/tmp/mem bs=1 count=1 2>/dev/null | dd of=/dev/null 2>/dev/null && echo device;"
        " test -c /dev/kmsg && echo kmsg; echo 0 > /proc/sys/kernel/panic_on_warn && echo sysctl;"
        " mount | while read a b c rest; do test $c = /sys && echo $rest; done; true"
    )
    text = await said(guest, spec, script)
    effective = next(line for line in text.splitlines() if line.startswith("CapEff:"))
    assert int(effective.split()[1], 16) == ALL_CAPABILITIES
    for word in ("mounted", "device", "kmsg", "sysctl"):
        assert f"\n{word}\n" in text
    assert "(rw," in text.splitlines()[-1]


def capability_names() -> list[str]:
    words = (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE"
        " NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT"
        " SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL"
        " SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    )
    return [f"CAP_{word}" for word in words.split()]


async def test_devices_are_made_and_others_are_out_of_reach(guest: Guest) -> None:
    spec = plain()
    for names in (
        spec.Process.Capabilities.Bounding,
        spec.Process.Capabilities.Permitted,
        spec.Process.Capabilities.Effective,
    ):
        names.append("CAP_MKNOD")
    spec.Linux.Devices.add(Path="/dev/mine", Type="c", Major=1, Minor=5, FileMode=0o640, UID=7, GID=8)
    script = (
        "stat -c '%a %u %g %t %T' /dev/mine; dd if=/dev/mine bs=4 count=1 2>/dev/null | dd of=/dev/null 2>/dev/null"
        " && echo read; mknod /tmp/kmsg c 1 11; cat /tmp/kmsg 2>/dev/null || echo denied;"
        " echo x > /dev/null && echo null"
    )
    assert await said(guest, spec, script) == "640 7 8 1 5\nread\ndenied\nnull\n"


async def test_limits_of_the_container(guest: Guest) -> None:
    spec = plain()
    resources = spec.Linux.Resources
    resources.CPU.Shares, resources.CPU.Quota, resources.CPU.Period = 512, 50000, 100000
    resources.CPU.Cpus, resources.CPU.Mems = "0", "0"
    resources.CPU.RealtimePeriod = 1000000
    resources.Memory.Limit = resources.Memory.Swap = 64 << 20
    resources.Memory.Reservation = 32 << 20
    resources.Memory.Swappiness, resources.Memory.Kernel = 60, 1 << 30
    resources.Pids.Limit = 77
    resources.HugepageLimits.add(Pagesize="2MB", Limit=4 << 20)
    resources.HugepageLimits.add(Pagesize="64KB", Limit=0)
    spec.Linux.Namespaces.add(Type="cgroup")
    spec.Mounts.add(
        destination="/sys/fs/cgroup",
        type="cgroup",
        source="cgroup",
        options=["nosuid", "noexec", "nodev", "ro"],
    )
    files = (
        "cpu.weight",
        "cpu.max",
        "cpuset.cpus",
        "memory.max",
        "memory.low",
        "pids.max",
        "hugetlb.2MB.max",
    )
    text = await said(guest, spec, f"cd /sys/fs/cgroup; cat {' '.join(files)}")
    weight, *rest = text.splitlines()
    assert 15 <= int(weight) <= 60  # 512 shares; the engines' formulas differ
    assert rest == ["50000 100000", "0", str(64 << 20), str(32 << 20), "77", str(4 << 20)]


async def test_profiles_and_labels_of_absent_security_modules(guest: Guest) -> None:
    spec = plain()
    spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
    spec.Process.SelinuxLabel = "system_u:system_r:container_t:s0:c1,c2"
    spec.Linux.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
    assert await said(guest, spec, "echo runs") == "runs\n"
    container_id = await guest.run("sleep", "1000")
    request = pb.ExecProcessRequest(container_id=container_id, exec_id="e", process=process(("true",)))
    request.process.ApparmorProfile = "cri-containerd.apparmor.d"
    request.process.SelinuxLabel = "system_u:system_r:container_t:s0:c1,c2"
    await guest.agent.exec_process(request)
    assert await guest.wait(container_id, "e") == 0
    request.string_user.uid = "nobody"
    with pytest.raises(RpcError, match="exec e: string_user of ExecProcessRequest") as caught:
        await guest.agent.exec_process(request)
    assert caught.value.code == Code.UNIMPLEMENTED
    await guest.remove(container_id)


async def test_the_pods_names_files_and_shared_memory(guest: Guest) -> None:
    spec = plain()
    spec.Hostname = "of-the-container"
    spec.Mounts.add(
        destination="/etc/resolv.conf", type="bind", source="/etc/resolv.conf", options=["rbind", "ro"]
    )
    spec.Mounts.add(destination="/dev/shm", type="bind", source=SHM, options=["rbind", "rw"])
    script = (
        "hostname; cat /etc/resolv.conf; df -k /dev/shm | tail -n 1; readlink /proc/self/ns/ipc;"
        " readlink /proc/self/ns/uts; readlink /proc/self/ns/net; test -e /dev/shm/x && echo found; echo > /dev/shm/x"
    )
    first = (await said(guest, spec, f"{script} || true")).splitlines()
    second = (await said(guest, spec, f"{script} || true")).splitlines()
    assert first[:3] == ["pod-0", "search example.test", "nameserver 192.0.2.1"]
    assert first[3].split()[1] == "2048"
    assert first[4:7] == second[4:7]
    assert (first[7:], second[7:]) == ([], ["found"])


async def test_a_volume_is_given_to_a_group(guest: Guest) -> None:
    path = "/run/kata-containers/sandbox/ephemeral/fs"
    storage = pb.Storage(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        mount_point=path,
        fs_group=pb.FSGroup(group_id=4321),
        shared=True,
    )
    spec = plain()
    spec.Process.User.UID, spec.Process.User.GID = 1000, 1000
    spec.Process.User.AdditionalGids.append(4321)
    spec.Process.Args[:] = [
        "sh",
        "-c",
        "stat -c '%g %a' /vol; touch /vol/$0; stat -c %g /vol/$0; ls /vol",
        "one",
    ]
    spec.Mounts.add(destination="/vol", type="bind", source=path, options=["rbind", "rw"])
    for name, expected in (("one", b"4321 3777\n4321\none\n"), ("two", b"4321 3777\n4321\none\ntwo\n")):
        container_id = guest.new_id()
        spec.Process.Args[3] = name
        await guest.agent.create_container(
            pb.CreateContainerRequest(container_id=container_id, OCI=spec, storages=[storage])
        )
        await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
        assert await guest.output(container_id) == expected
        await guest.remove(container_id)


async def test_statistics_of_memory_and_processes(guest: Guest) -> None:
    container_id = await guest.run(
        "sh", "-c", "dd if=/bin/busybox of=/tmp/copy 2>/dev/null; echo up; sleep 1000"
    )
    request = pb.ReadStreamRequest(container_id=container_id, len=10)
    assert (await guest.agent.read_stdout(request)).data == b"up\n"
    answer = await guest.agent.stats_container(pb.StatsContainerRequest(container_id=container_id))
    counters = answer.cgroup_stats.memory_stats.stats
    for name in (
        "anon",
        "inactive_file",
        "pgfault",
        "hierarchical_memory_limit",
        "events.oom_kill",
    ):
        assert name in counters, name
    assert answer.cgroup_stats.pids_stats.current in (1, 2)
    assert "2MB" in answer.cgroup_stats.hugetlb_stats
    await guest.remove(container_id)


def huge(pages: int) -> pb.Storage:
    """A volume of huge pages of 2 MiB."""
    return pb.Storage(
        driver="ephemeral",
        source="nodev",
        fstype="hugetlbfs",
        options=[f"pagesize={2 * MIB},size={2 * MIB * pages}", "mode=755", "uid=0", "fsgid=3000"],
        mount_point="/run/kata-containers/sandbox/ephemeral/huge",
    )


async def huge_pages(guest: Guest) -> tuple[int, int]:
    """How many the guest has, and how many of these nobody uses."""
    text = await said(guest, plain(), "cat /proc/meminfo")
    values = dict(line.split()[:2] for line in text.splitlines())
    return int(values["HugePages_Total:"]), int(values["HugePages_Free:"])


async def test_huge_pages_for_a_volume(guest: Guest) -> None:
    spec = plain()
    spec.Mounts.add(destination="/huge", type="bind", source=huge(0).mount_point, options=["rbind"])
    script = "stat -c '%g %a' /huge && busybox fallocate -l 4194304 /huge/file && sleep 1000"
    spec.Process.Args[:] = ["sh", "-c", script]
    container_id = guest.new_id()
    request = pb.CreateContainerRequest(container_id=container_id, OCI=spec, storages=[huge(4)])
    await guest.agent.create_container(request)
    assert await huge_pages(guest) == (4, 4)
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    read = pb.ReadStreamRequest(container_id=container_id, len=100)
    assert (await guest.agent.read_stdout(read)).data == b"3000 2775\n"
    await execute(guest, container_id, "size", "sh", "-c", "until [ -s /huge/file ]; do :; done")
    assert await guest.wait(container_id, "size") == 0
    assert await huge_pages(guest) == (4, 2)
    await guest.remove(container_id)
    assert await huge_pages(guest) == (0, 0)


async def test_more_huge_pages_than_there_is_memory(guest: Guest) -> None:
    spec = plain()
    request = pb.CreateContainerRequest(container_id=guest.new_id(), OCI=spec, storages=[huge(1000)])
    with pytest.raises(RpcError, match=r"memory for \d+ of 1000 huge pages of 2048 KiB") as caught:
        await guest.agent.create_container(request)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert await huge_pages(guest) == (0, 0)

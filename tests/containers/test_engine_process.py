"""What a container's process is: its namespaces, identity, rights and limits, seen from inside."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from oci_engine.capabilities import SETS
from oci_engine.errors import CannotExecute, SetupFailed
from tests.support.containers import spec, wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.containers import Containers, Spec


def test_first_process_of_its_own_world(containers: Containers) -> None:
    status, output = containers.sh(
        "echo $$; hostname; ip -o addr show lo | head -1; ls /proc/self/fd | wc -l; exit 7"
    )
    assert status == 7
    pid, name, loopback, files = output.splitlines()
    assert (pid, name) == ("1", "runk")
    assert "127.0.0.1/8" in loopback
    assert files == "4"  # standard streams, and the directory that ls reads


def test_killed_by_a_signal(containers: Containers) -> None:
    container_id, pid = containers.running()
    containers.engine.kill(container_id, 9)
    assert wait(pid) == 137
    containers.engine.delete(container_id)


def test_user_groups_umask_and_home(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["process"]["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027}

    _, output = containers.sh("id -u; id -G; umask; echo $HOME; touch /dev/shm/f && ls -ln /dev/shm/f", edit)
    uid, groups, umask, home, file = output.splitlines()
    assert (uid, sorted(groups.split()), umask) == ("1000", ["1001", "5", "7"], "0027")
    assert home == "/home/user"
    assert file.startswith("-rw-r-----")
    assert file.split()[2:4] == ["1000", "1001"]


def test_user_may_open_its_standard_output_again(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["process"]["user"] = {"uid": 1000, "gid": 1000}

    assert containers.sh("echo again >> /dev/stdout", edit) == (0, "again\n")


def test_capabilities_and_no_new_privileges(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        process = document["process"]
        process["user"] = {"uid": 1000, "gid": 1000}
        process["capabilities"] = {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT"], "effective": ["CAP_CHOWN"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"], "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"],
        }  # fmt: skip

    _, output = containers.sh("grep -E '^(Cap|NoNew)' /proc/self/status", edit)
    found = dict(line.split() for line in output.splitlines())
    # Across an exec by somebody other than root, what is ambient is permitted and effective.
    assert found == {
        "CapInh:": f"{1:016x}", "CapPrm:": f"{1:016x}", "CapEff:": f"{1:016x}", "CapBnd:": f"{0x40021:016x}",
        "CapAmb:": f"{1:016x}", "NoNewPrivs:": "1",
    }  # fmt: skip


def test_without_a_word_about_capabilities_there_are_none(containers: Containers) -> None:
    _, output = containers.sh(
        "grep -E '^Cap' /proc/self/status", lambda document: document["process"].pop("capabilities")
    )
    assert {line.split()[1] for line in output.splitlines()} == {"0" * 16}


def test_limits_and_scheduling(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["process"]["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1},
        ]
        document["process"]["oomScoreAdj"] = 321
        document["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE", "priority": 0}
        document["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
        document["linux"]["personality"] = {"domain": "LINUX32"}

    script = (
        "ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc; cat /proc/self/oom_score_adj;"
        " ionice; uname -m; cat /proc/1/stat"
    )
    _, output = containers.sh(script, edit)
    lines = output.splitlines()
    assert lines[:5] == ["100", "200", "0", "unlimited", "321"]
    assert "idle" in lines[5]
    assert lines[6] != os.uname().machine
    numbers = lines[7].rpartition(")")[2].split()
    assert (numbers[16], numbers[38]) == ("5", "3")  # nice value, and SCHED_BATCH


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_seccomp(containers: Containers, no_new_privileges: bool) -> None:
    def edit(document: Spec) -> None:
        document["process"]["noNewPrivileges"] = no_new_privileges
        document["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"] if os.uname().machine == "x86_64" else [],
            "syscalls": [
                {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {
                    "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 16,
                    "args": [{"index": 1, "value": value, "op": "SCMP_CMP_EQ"} for value in (10, 12)],
                },
            ],
        }  # fmt: skip

    script = (
        "grep Seccomp: /proc/self/status; mkdir /dev/shm/x; trap '' 10 12;"
        " kill -10 $$; kill -12 $$; kill -0 $$ && echo fine"
    )
    _, output = containers.sh(script, edit)
    assert "Seccomp:\t2" in output
    assert "No space left on device" in output
    assert output.count("Device or resource busy") == 2
    assert output.endswith("fine\n")


def test_a_filter_that_denies_by_default(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["execve", "write", "exit_group", "exit"], "action": "SCMP_ACT_ALLOW"}],
        }

    document = spec("/bin/busybox", "true")
    edit(document)
    status, _ = containers.run(document)
    assert status not in (0, 1)  # executed under the filter, in which its own loading does not work


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["no-such"], 127, "executable file not found in $PATH"),
        (["/no/such"], 127, "no such file or directory"),
        (["/etc/passwd"], 126, "permission denied"),
        (["/etc"], 126, "is a directory"),
    ],
)
def test_program_that_cannot_be_executed(
    containers: Containers, args: list[str], status: int, words: str
) -> None:
    with pytest.raises(CannotExecute, match="exec: ") as caught:
        containers.create(spec(*args))
    assert caught.value.status == status
    assert words in str(caught.value)


def test_script_without_its_interpreter_ends_with_the_status_of_shells(
    containers: Containers, own_rootfs: Path
) -> None:
    (own_rootfs / "bin" / "odd").write_text("#!/no/such\n")
    (own_rootfs / "bin" / "odd").chmod(0o755)
    document = spec("odd")
    document["root"]["path"] = str(own_rootfs)
    status, output = containers.run(document)
    assert status == 127
    assert 'exec: "odd"' in output


def test_limit_that_cannot_be_set(containers: Containers) -> None:
    """Above what the kernel allows anybody, fs.nr_open."""
    document = spec("true")
    document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 2**40, "hard": 2**40}]
    with pytest.raises(SetupFailed, match=r"process\.rlimits: RLIMIT_NOFILE: "):
        containers.create(document)


def test_working_directory_that_is_not_there(containers: Containers) -> None:
    document = spec("true")
    document["process"]["cwd"] = "/no/such"
    with pytest.raises(SetupFailed, match=r"process\.cwd: /no/such"):
        containers.create(document)


def test_user_namespace(containers: Containers, tmp_path: Path, own_rootfs: Path) -> None:
    subprocess.run(["chown", "-R", "100000:100000", str(own_rootfs)], check=True)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "file").write_text("seen\n")
    (private / "file").chmod(0o644)

    def edit(document: Spec) -> None:
        document["root"]["path"] = str(own_rootfs)
        document["linux"]["namespaces"] += [{"type": "user"}, {"type": "cgroup"}, {"type": "time"}]
        mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        document["linux"] |= {
            "uidMappings": mapping, "gidMappings": mapping, "timeOffsets": {"boottime": {"secs": 500_000_000}},
        }  # fmt: skip
        document["process"]["capabilities"] = {name: ["CAP_SYS_ADMIN", "CAP_MKNOD"] for name in SETS}
        document["process"]["oomScoreAdj"] = 100
        document["mounts"].append(
            {
                "destination": "/seen",
                "type": "bind",
                "source": str(private / "file"),
                "options": ["bind", "ro"],
            }
        )

    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    script = (
        "cat /proc/self/uid_map /proc/1/cgroup /seen; id -u; cat /proc/uptime; echo > /dev/null && echo null;"
        " mknod /dev/shm/m c 1 3 || echo no; ls -ln /dev/null /bin/busybox"
    )
    status, output = containers.sh(script, edit)
    assert status == 0, output
    lines = output.splitlines()
    assert lines[0].split() == ["0", "100000", "65536"]
    assert f"{containers.name}" not in output  # its group is the top of what it sees
    assert "seen" in lines
    assert any(line.startswith("5000") and "." in line for line in lines)
    assert "null" in lines
    assert "no" in lines


def test_namespaces_joined_by_path(containers: Containers) -> None:
    first, pid = containers.running()
    document = spec("sh", "-c", "hostname; echo $$; readlink /proc/self/ns/net")
    document["hostname"] = ""
    document["linux"]["namespaces"] = [
        {"type": "mount"},
        *({"type": kind, "path": f"/proc/{pid}/ns/{file}"}
          for kind, file in (("pid", "pid"), ("network", "net"), ("uts", "uts"), ("ipc", "ipc"))),
    ]  # fmt: skip
    status, output = containers.run(document)
    assert status == 0
    name, number, network = output.splitlines()
    assert name == "runk"
    assert number != "1"
    assert network == os.readlink(f"/proc/{pid}/ns/net")
    containers.engine.delete(first, force=True)
    wait(pid)


def test_sysctls(containers: Containers) -> None:
    def edit(document: Spec) -> None:
        document["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel/shmmni": "1234"}

    _, output = containers.sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni", edit)
    assert output.split() == ["1", "1234"]


def test_cpus_of_one_more_process(containers: Containers) -> None:
    """Before it is in the container's group, and then; the container's first process is left alone."""
    document = spec("sleep", "1000")
    document["process"]["execCPUAffinity"] = {"initial": "0", "final": "0"}
    container_id, pid = containers.running(document)
    show = ("grep", "Cpus_allowed_list", "/proc/self/status")
    everywhere = sorted(os.sched_getaffinity(0))
    assert sorted(os.sched_getaffinity(pid)) == everywhere
    assert containers.exec(container_id, *show)[1].split() == ["Cpus_allowed_list:", "0"]
    last = str(everywhere[-1])
    output = containers.exec(container_id, *show, execCPUAffinity={"initial": "0", "final": last})[1]
    assert output.split()[1] == last
    with pytest.raises(SetupFailed, match=r"process\.execCPUAffinity\.final: Invalid argument"):
        containers.exec(container_id, "true", execCPUAffinity={"final": "9999"})
    containers.engine.delete(container_id, force=True)
    wait(pid)


def test_a_mount_namespace_joined_by_path(containers: Containers) -> None:
    """It is in the other's file system, with a group, rights and a name of its own."""
    first, pid = containers.running()
    document = spec("sh", "-c", "readlink /proc/self/ns/mnt; hostname; ls / | head -1; pwd; touch /x")
    document |= {"mounts": [], "hostname": "second"}
    document["root"]["readonly"] = False
    document["process"]["cwd"] = "/etc"
    document["linux"] = {
        "namespaces": [
            {"type": "mount", "path": f"/proc/{pid}/ns/mnt"},
            {"type": "uts"},
            {"type": "pid", "path": f"/proc/{pid}/ns/pid"},
        ],
        "resources": {},
    }
    status, output = containers.run(document)
    lines = output.splitlines()
    assert lines[:4] == [os.readlink(f"/proc/{pid}/ns/mnt"), "second", "bin", "/etc"]
    assert "Read-only file system" in lines[4]
    assert status == 1
    containers.engine.delete(first, force=True)
    wait(pid)

"""What a pod's securityContext does inside of the guest: users, capabilities, seccomp, devices, kernel settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.client import CriError
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import HOST_DEVICES_HANDLER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.kubelet import Kubelet, Pod

# Bits of linux/capability.h.
CHOWN, NET_BIND_SERVICE, NET_RAW, SYS_ADMIN = 0, 10, 13, 21
#: containerd's list, that of Docker: 14 capabilities.
DEFAULT_CAPABILITIES = 0xA80425FB
PORTS = "20000\t20100"
# Masked and read-only paths as a kubelet sends them.
MASKED = (
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/sys/firmware",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@pytest.fixture(scope="module")
def machine(kubelet: Kubelet) -> Iterator[Pod]:
    """One virtual machine for most tests here. It has a user, sysctls and a long name of its own."""
    security = pb.LinuxSandboxSecurityContext(
        run_as_user=pb.Int64Value(value=65534), run_as_group=pb.Int64Value(value=65534)
    )
    linux = pb.LinuxPodSandboxConfig(
        sysctls={"net.ipv4.ip_local_port_range": PORTS.replace("\t", " "), "kernel.shm_rmid_forced": "1"}
    )
    with kubelet.pod(
        "security", security=security, linux=linux, hostname="web-0.nginx.default.svc.cluster.local"
    ) as pod:
        yield pod


@pytest.fixture
def pod(machine: Pod) -> Iterator[Pod]:
    """The pod, for containers that live as long as the test."""
    yield from machine.emptied()


@pytest.fixture(scope="module")
def privileged_machine(kubelet: Kubelet) -> Iterator[Pod]:
    """A pod that may have privileged containers, and shares the host's IPC namespace."""
    security = pb.LinuxSandboxSecurityContext(
        privileged=True, namespace_options=pb.NamespaceOption(ipc=pb.NODE)
    )
    with kubelet.pod("privileged", handler=HOST_DEVICES_HANDLER, security=security) as pod:
        yield pod


@pytest.fixture
def privileged(privileged_machine: Pod) -> Iterator[Pod]:
    """That pod, for containers that live as long as the test."""
    yield from privileged_machine.emptied()


def context(**fields: object) -> pb.LinuxContainerConfig:
    """A container's securityContext, with a kubelet's masked and read-only paths unless it is privileged."""
    paths = {} if fields.get("privileged") else {"masked_paths": MASKED, "readonly_paths": READ_ONLY}
    return pb.LinuxContainerConfig(
        security_context=pb.LinuxContainerSecurityContext(**{**paths, **fields})  # type: ignore[arg-type]
    )


def process_status(pod: Pod, container: str) -> dict[str, str]:
    """/proc/self/status of an exec."""
    lines = pod.exec(container, "cat", "/proc/self/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(pod: Pod, container: str) -> tuple[int, int]:
    """The effective and the bounding set."""
    status = process_status(pod, container)
    return int(status["CapEff"], 16), int(status["CapBnd"], 16)


def works(pod: Pod, container: str, script: str) -> bool:
    return pod.cri.exec(container, ["sh", "-c", script]).exit_code == 0


@pytest.mark.parametrize(
    ("fields", "identity"),
    [
        ({"run_as_user": 1000}, "1000 1000 1000 2000"),
        ({"run_as_user": 1000, "run_as_group": 1234}, "1000 1234 1234 2000"),
        ({"run_as_username": "user"}, "1000 1000 1000 2000"),
        ({"run_as_user": 4321, "run_as_group": 5, "supplemental_groups": [77, 88]}, "4321 5 5 77 88"),
        ({"supplemental_groups": [99]}, "0 0 0 99"),
    ],
    ids=["uid", "uid-gid", "name", "groups", "root-groups"],
)
def test_users_and_groups(pod: Pod, fields: dict[str, object], identity: str) -> None:
    wanted = {
        name: pb.Int64Value(value=value) if name in ("run_as_user", "run_as_group") else value  # type: ignore[arg-type]
        for name, value in fields.items()
    }
    container = pod.run("user", linux=context(**wanted))
    assert pod.exec(container, "sh", "-c", "echo $(id -u) $(id -g) $(id -G)") == f"{identity}\n"


def test_users_that_are_not_root_have_no_capabilities(pod: Pod) -> None:
    container = pod.run("nobody", linux=context(run_as_user=pb.Int64Value(value=1000)))
    assert capabilities(pod, container) == (0, DEFAULT_CAPABILITIES)
    assert not works(pod, container, "echo x > /etc/hostname")


def test_capabilities_are_added_and_dropped(pod: Pod) -> None:
    default = pod.run("default", linux=context())
    assert capabilities(pod, default) == (DEFAULT_CAPABILITIES, DEFAULT_CAPABILITIES)
    changed = pb.Capability(add_capabilities=["SYS_ADMIN"], drop_capabilities=["NET_RAW", "CHOWN"])
    some = (DEFAULT_CAPABILITIES | 1 << SYS_ADMIN) & ~(1 << NET_RAW | 1 << CHOWN)
    container = pod.run("changed", linux=context(capabilities=changed))
    assert capabilities(pod, container) == (some, some)
    assert works(pod, default, "touch /tmp/x; chown 5 /tmp/x")
    assert not works(pod, container, "touch /tmp/x; chown 5 /tmp/x")
    assert works(pod, container, "mount -t tmpfs x /tmp")
    assert not works(pod, default, "mount -t tmpfs x /tmp")
    only = pb.Capability(add_capabilities=["NET_BIND_SERVICE"], drop_capabilities=["ALL"])
    container = pod.run("only", linux=context(capabilities=only))
    assert capabilities(pod, container) == (1 << NET_BIND_SERVICE,) * 2


def test_no_new_privileges(pod: Pod) -> None:
    container = pod.run("no-new", linux=context(no_new_privs=True, run_as_user=pb.Int64Value(value=1000)))
    assert process_status(pod, container)["NoNewPrivs"] == "1"
    assert pod.exec(container, "sh", "-c", "cat /proc/1/status | grep NoNewPrivs").split() == [
        "NoNewPrivs:",
        "1",
    ]
    container = pod.run("new", linux=context())
    assert process_status(pod, container)["NoNewPrivs"] == "0"


def test_read_only_root(pod: Pod, tmp_path: Path) -> None:
    data = pb.Mount(host_path=str(tmp_path), container_path="/data")
    container = pod.run("read-only", mounts=[data], linux=context(readonly_rootfs=True))
    assert "Read-only file system" in pod.cri.exec(container, ["touch", "/new"]).stderr.decode()
    assert works(pod, container, "echo x > /data/new; echo x > /dev/shm/new")


def test_seccomp(pod: Pod, tmp_path: Path) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71}],
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    allowed = pb.Capability(add_capabilities=["SYS_ADMIN"])

    def run(name: str, kind: pb.SecurityProfile.ProfileType.ValueType, reference: str = "") -> str:
        seccomp = pb.SecurityProfile(profile_type=kind, localhost_ref=reference)
        # Without the capability unshare would be refused by it, and with it the default profile allows unshare.
        return pod.run(
            name, linux=context(seccomp=seccomp, capabilities=allowed if name != "default" else None)
        )

    default = run("default", pb.SecurityProfile.RuntimeDefault)
    unconfined = run("unconfined", pb.SecurityProfile.Unconfined)
    local = run("local", pb.SecurityProfile.Localhost, str(tmp_path / "profile.json"))
    modes = [process_status(pod, container)["Seccomp"] for container in (default, unconfined, local)]
    assert modes == ["2", "0", "2"]
    assert not works(pod, default, "unshare -U true")
    assert works(pod, unconfined, "unshare -U true")
    assert pod.cri.exec(local, ["mkdir", "/tmp/x"]).stderr.decode().endswith("Protocol error\n")
    assert works(pod, unconfined, "mkdir /tmp/x")
    assert "71" not in pod.exec(default, "mkdir", "/tmp/x")


def test_missing_seccomp_profile_is_named(pod: Pod) -> None:
    seccomp = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="/no/such.json")
    with pytest.raises(CriError, match=r"/no/such\.json"):
        pod.run("missing", linux=context(seccomp=seccomp))


def test_masked_and_read_only_paths(pod: Pod) -> None:
    container = pod.run("paths", linux=context())
    assert (
        pod.exec(container, "sh", "-c", "cat /proc/kcore /proc/keys /proc/timer_list; ls /sys/firmware") == ""
    )
    for path in ("/proc/sys/kernel/domainname", "/proc/sysrq-trigger", "/sys/kernel/mm/ksm/run"):
        refusal = pod.cri.exec(container, ["sh", "-c", f"echo 0 > {path}"]).stderr.decode()
        assert "Read-only file system" in refusal, path
    assert pod.exec(container, "stat", "-f", "-c", "%T", "/proc", "/sys").split() == ["proc", "sysfs"]
    unmasked = pod.run("unmasked", linux=context(masked_paths=["/proc/kcore"], readonly_paths=[]))
    assert works(pod, unmasked, "ls -d /sys/firmware/* && cat /proc/timer_list > /dev/null")


def test_devices(pod: Pod) -> None:
    container = pod.run("devices", linux=context())
    usual = (
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "ptmx",
        "shm",
        "fd",
        "stdin",
        "stdout",
        "stderr",
    )
    assert set(usual) <= set(pod.exec(container, "ls", "/dev").split())
    for script in (
        "[ $(head -c 8 /dev/zero | wc -c) = 8 ]", "[ $(head -c 8 /dev/urandom | wc -c) = 8 ]",
        "echo x > /dev/null", "[ -p /dev/stdin ] || [ -c /dev/stdin ]", "! echo x > /dev/full",
    ):  # fmt: skip
        assert works(pod, container, script), script
    # No device but those: the capability to make nodes is there, the right to open them is not.
    assert works(pod, container, "mknod /tmp/kmsg c 1 11")
    assert "Operation not permitted" in pod.cri.exec(container, ["cat", "/tmp/kmsg"]).stderr.decode()


def test_shared_memory_is_the_pods(pod: Pod) -> None:
    one, two = pod.run("one", linux=context()), pod.run("two", linux=context())
    pod.exec(one, "sh", "-c", "echo shared > /dev/shm/file")
    assert pod.exec(two, "cat", "/dev/shm/file") == "shared\n"
    blocks, size = pod.exec(one, "stat", "-f", "-c", "%b %S", "/dev/shm").split()
    assert int(blocks) * int(size) == 64 << 20


def test_pod_settings(pod: Pod) -> None:
    container = pod.run("settings", linux=context())
    assert pod.exec(container, "cat", "/proc/sys/net/ipv4/ip_local_port_range") == f"{PORTS}\n"
    assert pod.exec(container, "cat", "/proc/sys/kernel/shm_rmid_forced") == "1\n"
    assert pod.exec(container, "hostname") == "web-0.nginx.default.svc.cluster.local\n"


def test_process_limits_and_score(pod: Pod) -> None:
    linux = context()
    linux.resources.oom_score_adj = 777
    container = pod.run("limits", linux=linux)
    assert pod.exec(container, "cat", "/proc/1/oom_score_adj") == "777\n"
    limits = pod.exec(container, "sh", "-c", "ulimit -Sn; ulimit -Hn").split()
    assert all(int(limit) >= 1024 for limit in limits)
    # An exec has those of the container.
    own = pod.exec(container, "grep", "Max open files", "/proc/1/limits").split()[3:5]
    assert own == limits


@pytest.mark.parametrize("name", ["net.no.such", "kernel.msgmax"])
def test_sysctls_that_cannot_be_set_are_named(kubelet: Kubelet, name: str) -> None:
    linux = pb.LinuxPodSandboxConfig(sysctls={name: "nonsense"})
    with pytest.raises(CriError, match=f"sysctl {name}") as caught:
        kubelet.run_pod("sysctl", linux=linux)
    assert "\n" not in caught.value.details.strip()


def test_privileged(privileged: Pod) -> None:
    """Everything, of the guest: CRI offers the host's devices here, and they mean nothing there."""
    container = privileged.run("privileged", linux=context(privileged=True))
    # containerd gives away what it has itself, which is what this process has.
    everything = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    assert capabilities(privileged, container) == (everything, everything)
    assert process_status(privileged, container)["Seccomp"] == "0"
    assert works(privileged, container, "mount -t tmpfs x /tmp && echo 0 > /proc/sys/vm/swappiness")
    assert works(privileged, container, "mkdir /sys/fs/cgroup/mine && rmdir /sys/fs/cgroup/mine")
    assert works(privileged, container, "head -c 1 /dev/kmsg && [ -c /dev/vsock ] && [ -c /dev/fuse ]")
    # Each node leads to a device that is there.
    script = """
        find /dev -xdev '(' -type b -o -type c ')' -exec stat -c '%F %t %T %n' {} + |
        while read kind _ _ major minor name; do
            [ $kind = block ] || kind=char
            [ -e /sys/dev/$kind/$((0x$major)):$((0x$minor)) ] || echo $name
        done
    """
    assert privileged.exec(container, "sh", "-c", script) == ""


def test_the_hosts_namespaces_are_the_guests(privileged: Pod) -> None:
    """There is no way out of a virtual machine."""
    namespaces = pb.NamespaceOption(network=pb.POD, pid=pb.NODE, ipc=pb.NODE)
    container = privileged.run("host", linux=context(namespace_options=namespaces, privileged=True))
    assert works(privileged, container, "echo x > /dev/shm/file")
    assert "containerd" not in privileged.exec(container, "ps", "-o", "args")


def test_user_namespaces_are_refused(kubelet: Kubelet) -> None:
    """By the shim, or before it by a containerd that asks the runtime whether it has them."""
    if kubelet.cri.version().runtime_version.lstrip("v").startswith("1.6."):
        pytest.skip("containerd 1.6 knows nothing of them")
    mapping = [pb.IDMapping(host_id=100000, container_id=0, length=65536)]
    options = pb.UserNamespace(mode=pb.POD, uids=mapping, gids=mapping)
    security = pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(userns_options=options))
    with pytest.raises(CriError, match=r"(?i)user namespace"):
        kubelet.run_pod("mapped", security=security)

"""OCI JSON to the agent's messages, every field of it, and the edits for the guest."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import MessageToDict

from agent_proto.gen import oci_pb2
from config.schema import SharedMount
from shim import mounts, oci
from shim.errors import InvalidRequest
from tests.support.namespaces import in_mount_namespace

if TYPE_CHECKING:
    from pathlib import Path

UNLIMITED = (1 << 64) - 1

PROCESS = {
    "terminal": True,
    "consoleSize": {"height": 25, "width": 80},
    "user": {"uid": 1000, "gid": 1001, "additionalGids": [4, 24], "username": "me"},
    "args": ["/bin/sh", "-c", "echo ä"],
    "env": ["A=b", "EMPTY="],
    "cwd": "/work",
    "capabilities": {
        "bounding": ["CAP_KILL"], "effective": ["CAP_CHOWN"], "inheritable": ["CAP_FOWNER"],
        "permitted": ["CAP_SETUID"], "ambient": ["CAP_SETGID"],
    },
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": UNLIMITED, "soft": 1024}],
    "noNewPrivileges": True,
    "apparmorProfile": "profile",
    "oomScoreAdj": -998,
    "selinuxLabel": "label",
}  # fmt: skip
THROTTLE = [{"major": 8, "minor": 2, "rate": 1000}]
RESOURCES = {
    "devices": [{"allow": False, "type": "c", "major": -1, "minor": -1, "access": "rwm"}],
    "memory": {
        "limit": 1 << 30, "reservation": 5, "swap": -1, "kernel": 6, "kernelTCP": 7, "swappiness": 60,
        "disableOOMKiller": True,
    },
    "cpu": {
        "shares": 512, "quota": -1, "period": 100000, "realtimeRuntime": 1, "realtimePeriod": 2, "cpus": "0-1",
        "mems": "0",
    },
    "pids": {"limit": -1},
    "blockIO": {
        "weight": 10, "leafWeight": 11, "weightDevice": [{"major": 8, "minor": 1, "weight": 12, "leafWeight": 13}],
        "throttleReadBpsDevice": THROTTLE, "throttleWriteBpsDevice": THROTTLE,
        "throttleReadIOPSDevice": THROTTLE, "throttleWriteIOPSDevice": THROTTLE,
    },
    "hugepageLimits": [{"pageSize": "2MB", "limit": 209715200}],
    "network": {"classID": 7, "priorities": [{"name": "eth0", "priority": 3}]},
    "unified": {"memory.high": "1000000", "cpu.idle": "1"},
}  # fmt: skip
HOOK = [{"path": "/hook", "args": ["hook", "now"], "env": ["X=y"], "timeout": 5}]
SPEC = {
    "ociVersion": "1.1.0",
    "process": PROCESS,
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "host",
    "mounts": [{"destination": "/proc", "source": "proc", "type": "proc", "options": ["nosuid", "noexec"]}],
    "hooks": {
        "prestart": HOOK, "poststart": HOOK, "poststop": HOOK, "createRuntime": HOOK, "createContainer": HOOK,
        "startContainer": HOOK,
    },
    "annotations": {"a": "b", "empty": ""},
    "linux": {
        "uidMappings": [{"hostID": 1000, "containerID": 5, "size": 10}],
        "gidMappings": [{"hostID": 2000, "containerID": 5, "size": 20}],
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "resources": RESOURCES,
        "cgroupsPath": "/kubepods/x",
        "namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "ipc", "path": "/p"}, {"type": "mount"}],
        "devices": [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2}
        ],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["zero"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                {
                    "names": ["personality", "clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 1, "value": UNLIMITED, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}],
                },
            ],
        },
        "rootfsPropagation": "slave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "mount label",
        "intelRdt": {"l3CacheSchema": "L3:0=ff"},
    },
}  # fmt: skip

# OCI's own JSON names that differ from the messages' names by more than capitals.
RENAMED = {"ociversion": "version", "errnoret": "errnoret"}


def lowered(value: Any) -> Any:
    """The same tree with names in small letters and numbers as text: what is left of it is the content."""
    if isinstance(value, dict):
        return {RENAMED.get(name.lower(), name.lower()): lowered(item) for name, item in value.items()}
    if isinstance(value, list):
        return [lowered(item) for item in value]
    return value if isinstance(value, bool) else str(value)


def shown(message: Any) -> Any:
    return lowered(MessageToDict(message, preserving_proto_field_name=True))


def without_defaults(value: Any) -> Any:
    """What proto3 does not write: false, and 0 outside of `optional`."""
    if isinstance(value, dict):
        return {name: without_defaults(item) for name, item in value.items() if item is not False}
    return [without_defaults(item) for item in value] if isinstance(value, list) else value


def test_every_field() -> None:
    assert shown(oci.spec_to_proto(SPEC, "config.json")) == without_defaults(lowered(SPEC))


def test_the_spec_above_leaves_nothing_out() -> None:
    def unset(message: Any, path: str) -> list[str]:
        found = []
        for field in message.DESCRIPTOR.fields:
            value = getattr(message, field.name)
            if field.name in ("Solaris", "Windows"):
                continue
            if field.is_repeated and not value:
                found.append(f"{path}.{field.name}")
            elif field.message_type and field.is_repeated and not field.message_type.GetOptions().map_entry:
                found += unset(value[-1], f"{path}.{field.name}")
            elif field.message_type and not field.is_repeated:
                found += unset(value, f"{path}.{field.name}")
        return found

    assert unset(oci.spec_to_proto(SPEC, ""), "") == []


def drop_the_hosts(resources: dict[str, Any]) -> None:
    """Take out what names the host's devices, processors and memory nodes."""
    del resources["devices"], resources["blockio"], resources["network"]
    del resources["cpu"]["cpus"], resources["cpu"]["mems"]


def test_process_and_resources_by_themselves() -> None:
    process = lowered(PROCESS)
    del process["selinuxlabel"], process["apparmorprofile"]  # the host's
    assert shown(oci.process_to_proto(PROCESS, "process")) == process
    resources = without_defaults(lowered(copy.deepcopy(RESOURCES)))
    message = oci.resources_to_proto(RESOURCES, "r")
    assert shown(message) == resources
    drop_the_hosts(resources)
    oci.drop_host_resources(message)
    assert shown(message) == resources


def test_limits_that_are_not_given_stay_absent() -> None:
    """An agent takes a limit that is there and 0 for a limit to be set."""
    resources = oci.resources_to_proto({"memory": {"limit": 1}}, "resources")
    assert MessageToDict(resources) == {"Memory": {"Limit": "1"}}


def test_errno_of_zero_is_not_absence() -> None:
    syscalls = oci.spec_to_proto(SPEC, "").Linux.Seccomp.Syscalls
    assert [call.WhichOneof("ErrnoRet") for call in syscalls] == ["errnoret", "errnoret", None]
    assert [call.errnoret for call in syscalls] == [38, 0, 0]


def test_nulls_and_unknown_keys_are_absent() -> None:
    raw: dict[str, Any] = {
        "process": {"args": None, "user": {"additionalGids": None}, "ioPriority": {"class": "x"}},
        "hooks": None,
        "annotations": None,
        "linux": {"resources": None, "namespaces": None, "personality": {}, "timeOffsets": None},
        "vm": {},
    }
    spec = oci.spec_to_proto(raw, "")
    assert shown(spec) == {"process": {"user": {}}, "linux": {}}


def test_empty_object_is_presence() -> None:
    spec = oci.spec_to_proto({"linux": {"resources": {}}}, "")
    assert spec.Linux.HasField("Resources")
    assert not spec.HasField("Process")


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"process": []}, "config.json.process"),
        ({"process": {"args": "sleep"}}, "config.json.process.args"),
        ({"process": {"args": ["a", 5]}}, "config.json.process.args"),
        ({"process": {"args": {"a": "b"}}}, "config.json.process.args"),
        ({"process": {"cwd": 5}}, "config.json.process.cwd"),
        ({"process": {"user": {"uid": "root"}}}, "config.json.process.user.uid"),
        ({"process": {"user": {"uid": -1}}}, "config.json.process.user.uid"),
        ({"process": {"user": {"uid": 1 << 32}}}, "config.json.process.user.uid"),
        ({"process": {"user": {"uid": 1.5}}}, "config.json.process.user.uid"),
        ({"process": {"rlimits": [{}, {"hard": "x"}]}}, "config.json.process.rlimits[1].hard"),
        ({"process": {"rlimits": {"hard": 1}}}, "config.json.process.rlimits"),
        ({"annotations": {"a": 1}}, "config.json.annotations"),
        ({"annotations": ["a"]}, "config.json.annotations"),
        ({"linux": {"seccomp": {"syscalls": [{"errnoRet": -1}]}}}, "config.json.linux.seccomp.syscalls[0].errnoRet"),
        ({"mounts": ["/proc"]}, "config.json.mounts[0]"),
        ({"mounts": 5}, "config.json.mounts"),
        ({"linux": {"resources": {"hugepageLimits": [{"pageSize": 2}]}}},
         "config.json.linux.resources.hugepageLimits[0].pageSize"),
    ],
)  # fmt: skip
def test_wrong_type(raw: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        oci.spec_to_proto(raw, "config.json")
    assert str(caught.value).startswith(f"{where}: ")


def edited(raw: dict[str, Any], *, keep_seccomp: bool = True) -> tuple[oci_pb2.Spec, bool]:
    spec = oci.spec_to_proto(copy.deepcopy(raw), "")
    joins = oci.edit_for_guest(
        spec, rootfs="/guest/rootfs", container_type="pod_container", bundle="/b", keep_seccomp=keep_seccomp
    )
    return spec, joins


def test_edits_of_a_full_spec() -> None:
    spec, joins = edited(SPEC)
    expected = without_defaults(lowered(copy.deepcopy(SPEC)))
    expected["root"]["path"] = "/guest/rootfs"
    expected["annotations"] |= {
        "io.katacontainers.pkg.oci.container_type": "pod_container",
        "io.katacontainers.pkg.oci.bundle_path": "/b",
    }
    expected["hooks"] = {"startcontainer": expected["hooks"]["startcontainer"]}
    del expected["linux"]["mountlabel"]
    del expected["process"]["selinuxlabel"], expected["process"]["apparmorprofile"]
    drop_the_hosts(expected["linux"]["resources"])
    expected["linux"]["namespaces"] = [{"type": "ipc"}, {"type": "mount"}, {"type": "cgroup"}]
    assert shown(spec) == expected
    assert joins


def test_no_path_of_the_host_is_told() -> None:
    raw = copy.deepcopy(SPEC) | {"hooks": {"prestart": [{"path": "/host/hook"}]}}
    text = str(edited(raw)[0])
    assert "/host" not in text
    assert "/proc/1/ns" not in text


def test_seccomp_can_be_taken_out() -> None:
    assert not edited(SPEC, keep_seccomp=False)[0].Linux.HasField("Seccomp")


def test_initial_data_of_the_guest_are_no_containers() -> None:
    name = "io.katacontainers.config.hypervisor.cc_init_data"
    spec, _ = edited({"annotations": {name: "eA==", f"{name}x": "kept"}})
    assert name not in spec.Annotations
    assert spec.Annotations[f"{name}x"] == "kept"


def test_annotations_of_the_caller_win() -> None:
    spec, _ = edited({"annotations": {"io.katacontainers.pkg.oci.container_type": "mine"}})
    assert spec.Annotations["io.katacontainers.pkg.oci.container_type"] == "mine"


@pytest.mark.parametrize(
    ("namespaces", "joins"),
    [
        ([], False),
        ([{"type": "pid"}], False),
        ([{"type": "pid", "path": "/p"}], True),
        ([{"type": "ipc", "path": "/p"}], False),
    ],
)
def test_pid_namespace(namespaces: list[dict[str, str]], joins: bool) -> None:
    assert edited({"linux": {"namespaces": namespaces}})[1] is joins


@pytest.mark.parametrize(
    "asked_for", [[], [{"type": "cgroup"}], [{"type": "cgroup", "path": "/proc/1/ns/cgroup"}]]
)
def test_cgroup_namespace_is_the_containers_own(asked_for: list[dict[str, str]]) -> None:
    namespaces = edited({"linux": {"namespaces": [{"type": "mount"}, *asked_for]}})[0].Linux.Namespaces
    assert [(ns.Type, ns.Path) for ns in namespaces] == [("mount", ""), ("cgroup", "")]


ALL = {"access": "rwm"}
NULL = {"type": "c", "major": 1, "minor": 3, "access": "rwm"}
LOOP = [{"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0}]


@pytest.mark.parametrize(
    ("rules", "privileged"),
    [
        ([], False),
        ([ALL | {"allow": True}], True),
        ([ALL | {"allow": False}, ALL | {"allow": True}], True),
        ([ALL | {"allow": True, "type": "a", "major": -1, "minor": -1}], True),
        ([ALL | {"allow": False}, NULL | {"allow": True}], False),
        ([ALL | {"allow": True}, ALL | {"allow": False}], False),
        ([NULL | {"allow": True}], False),
        ([{"allow": True, "type": "c", "access": "rwm"}], False),
    ],
)
def test_privileged_containers_get_the_guests_devices(rules: list[dict[str, Any]], privileged: bool) -> None:
    spec, _ = edited({"linux": {"resources": {"devices": rules}, "devices": LOOP}})
    kept = [(rule.Allow, rule.Type, rule.Access) for rule in spec.Linux.Resources.Devices]
    assert kept == ([(True, "a", "rwm")] if privileged else [])
    assert [device.Path for device in spec.Linux.Devices] == ([] if privileged else ["/dev/loop0"])


def test_user_namespaces_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"user namespaces are not supported.*hostUsers"):
        oci.check(oci.spec_to_proto({"linux": {"namespaces": [{"type": "pid"}, {"type": "user"}]}}, ""))
    oci.check(oci.spec_to_proto(SPEC, ""))


@pytest.mark.parametrize(
    "name",
    [
        "sgx.intel.com/epc",
    ],
)
def test_annotations_that_ask_for_what_no_guest_has_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^annotation {name}: not supported .*; remove it$"):
        oci.check(oci.spec_to_proto({"annotations": {name: "1"}}, ""))


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ({"io.kubernetes.cri.container-name": "web"}, ["a", "c"]),
        ({"io.kubernetes.cri-o.ContainerName": "db"}, ["b"]),
        ({"io.kubernetes.cri.container-name": "other"}, []),
        ({}, []),
    ],
)
def test_shared_mounts_are_those_of_the_container(annotations: dict[str, str], found: list[str]) -> None:
    paths = {"src_ctr": "init", "src_path": "/s", "dst_path": "/d"}
    configured = [
        SharedMount(name=name, dst_ctr=container, **paths)
        for name, container in (("a", "web"), ("b", "db"), ("c", "web"), ("d", ""))
    ]
    sent = oci.shared_mounts(oci.spec_to_proto({"annotations": annotations}, ""), configured)
    assert [mount.name for mount in sent] == found
    for mount in sent:
        assert (mount.src_ctr, mount.src_path, mount.dst_path) == ("init", "/s", "/d")


@pytest.mark.parametrize(
    ("mount", "pods"),
    [
        ({"type": "tmpfs", "source": "shm", "options": ["nosuid", "size=65536k"]}, True),
        ({"type": "bind", "source": "/run/x/sandboxes/S/shm", "options": ["rbind", "ro"]}, True),
        ({"type": "none", "source": "/var/lib/x/containers/C/mounts/shm", "options": ["rbind"]}, True),
        ({"type": "bind", "source": "/dev/shm", "options": ["rbind"]}, True),
        (
            {"type": "bind", "source": "/pods/u/volumes/kubernetes.io~empty-dir/shm", "options": ["rbind"]},
            False,
        ),
        ({"type": "bind", "source": "/pods/S/volumes/dshm", "options": ["rbind"]}, False),
        ({"type": "bind", "source": "/run/x/sandboxes/other/shm", "options": ["rbind"]}, False),
        ({"type": "ephemeral", "source": "x"}, False),
    ],
)
def test_volumes_on_dev_shm_are_the_users(mount: dict[str, Any], pods: bool) -> None:
    spec = oci.spec_to_proto({"mounts": [mount | {"destination": "/dev/shm"}]}, "")
    assert oci.is_pods_shm(spec.Mounts[0], ("S", "C")) is pods
    spec.Mounts[0].destination = "/dev/shm2"
    assert not oci.is_pods_shm(spec.Mounts[0], ("S", "C"))


VOLUMES = "/var/lib/kubelet/pods/1-2/volumes"
EMPTY_DIR = f"{VOLUMES}/kubernetes.io~empty-dir/cache"


def test_empty_dirs_of_huge_pages_are_the_guests(tmp_path: Path) -> None:
    limits = [{"pageSize": "2MB", "limit": 8 << 20}, {"pageSize": "1GB", "limit": 1 << 30}]
    spec = oci.spec_to_proto({"linux": {"resources": {"hugepageLimits": limits}}}, "config.json")

    def inside() -> None:
        mounts.mount("tmpfs", str(tmp_path), "tmpfs")
        assert oci.huge_pages_storage(EMPTY_DIR, str(tmp_path), spec) is None
        mounts.mount("nodev", str(tmp_path), "hugetlbfs", 0, "pagesize=2M,mode=775,gid=3000")
        storage = oci.huge_pages_storage(f"{EMPTY_DIR}/", str(tmp_path), spec)
        assert storage is not None
        assert (storage.driver, storage.fstype, storage.shared) == ("ephemeral", "hugetlbfs", True)
        assert storage.options == [f"pagesize={2 << 20},size={8 << 20}", "mode=775", "uid=0", "fsgid=3000"]
        assert storage.mount_point == "/run/kata-containers/sandbox/ephemeral/cache"
        assert oci.huge_pages_storage("/dev/hugepages", str(tmp_path), spec) is None

    in_mount_namespace(inside)


@pytest.mark.parametrize("kept", [True, False])
def test_filters_that_ask_the_host_are_refused_where_filters_are_kept(kept: bool) -> None:
    spec = oci_pb2.Spec()
    spec.Linux.Seccomp.Syscalls.add(Names=["mkdir"], Action="SCMP_ACT_NOTIFY")
    given: dict[str, Any] = {"rootfs": "/r", "container_type": "t", "bundle": "/b", "keep_seccomp": kept}
    if kept:
        with pytest.raises(
            InvalidRequest, match="SCMP_ACT_NOTIFY: the program that would be asked is on the host"
        ):
            oci.edit_for_guest(spec, **given)
    else:
        oci.edit_for_guest(spec, **given)
        assert not spec.Linux.HasField("Seccomp")


def test_limits_of_block_io_are_kept_for_the_guests_disks() -> None:
    """Weights and other disks are the host's, and a group that is left empty is not there."""
    io = oci_pb2.LinuxBlockIO(Weight=100)
    io.WeightDevice.add(Major=8, Minor=0, Weight=10)
    for minor in (0, 16):
        io.ThrottleReadBpsDevice.add(Major=8, Minor=minor, Rate=5)
    io.ThrottleWriteIOPSDevice.add(Major=9, Minor=0, Rate=6)
    resources = oci_pb2.LinuxResources(BlockIO=io)
    oci.drop_host_resources(resources, {(8, 16)})
    wanted = oci_pb2.LinuxBlockIO()
    wanted.ThrottleReadBpsDevice.add(Major=8, Minor=16, Rate=5)
    assert resources.BlockIO == wanted
    oci.drop_host_resources(resources)
    assert not resources.HasField("BlockIO")

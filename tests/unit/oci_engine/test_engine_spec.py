"""Reading a specification: what is taken, what is wrong and where, what is refused by name."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_engine.errors import SpecError, Unsupported
from oci_engine.spec import read_spec, sysctl_namespace
from runk.default_spec import default_spec


def changed(path: str, value: object) -> dict[str, Any]:
    """The default specification with one field, by its path with dots, set to something else."""
    document: Any = copy.deepcopy(default_spec())
    *folders, name = path.split(".")
    place = document
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place.setdefault(folder, {})
    if isinstance(place, list):
        place[int(name)] = value
    else:
        place[name] = value
    return document  # type: ignore[no-any-return]


def test_default_specification() -> None:
    spec = read_spec(default_spec())
    assert spec.process is not None
    assert spec.process.args == ("sh",)
    assert spec.process.capabilities is not None
    assert spec.process.capabilities["ambient"] == 1 << 29 | 1 << 5 | 1 << 10
    assert spec.linux.namespaces == dict.fromkeys(("pid", "network", "ipc", "uts", "mount"), "")
    assert [mount.destination for mount in spec.mounts][:2] == ["/proc", "/dev"]
    assert spec.root.readonly


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1", "1.3.0"])
def test_versions(version: str) -> None:
    assert read_spec(changed("ociVersion", version)).version == version


WRONG: list[tuple[str, object, str, str]] = [
    ("ociVersion", None, "ociVersion", "is missing"),
    ("ociVersion", 1, "ociVersion", "want a string, got a number"),
    ("root", [], "root", "want an object, got an array"),
    ("root.path", None, "root.path", "is missing"),
    ("root.readonly", "yes", "root.readonly", "want true or false, got a string"),
    ("process.args", [], "process.args", "must name a program"),
    ("process.args", ["a\0b"], "process.args[0]", "NUL"),
    ("process.args", "sh", "process.args", "want an array, got a string"),
    ("process.cwd", "tmp", "process.cwd", "want an absolute path, got 'tmp'"),
    ("process.env", ["A=b", "C"], "process.env[1]", "want NAME=value, got 'C'"),
    ("process.user.uid", -1, "process.user.uid", "want a number from 0 to 4294967295, got -1"),
    ("process.user.uid", True, "process.user.uid", "want a whole number, got a boolean"),
    ("process.user.uid", 1.5, "process.user.uid", "want a whole number, got 1.5"),
    ("process.user.additionalGids", [1, 2**32], "process.user.additionalGids[1]", "want a number"),
    ("process.rlimits.0.type", "RLIMIT_NONE", "process.rlimits[0].type", "want one of RLIMIT_AS"),
    ("process.rlimits.0.soft", 4096, "process.rlimits[0].soft", "4096 is above the hard limit 1024"),
    ("process.oomScoreAdj", 1001, "process.oomScoreAdj", "want a number from -1000 to 1000"),
    ("mounts.2", 7, "mounts[2]", "want an object, got a number"),
    ("mounts.2.destination", "", "mounts[2].destination", "is empty"),
    ("mounts.2.options", [None], "mounts[2].options[0]", "want a string, got null"),
    ("hooks.prestart", [{"path": "rel"}], "hooks.prestart[0].path", "want an absolute path"),
    ("hooks.prestart", [{"path": "/a", "timeout": 0}], "hooks.prestart[0].timeout", "want a number from 1"),
    ("linux.namespaces.1.type", "nets", "linux.namespaces[1].type", "want one of cgroup, ipc"),
    ("linux.namespaces.1.type", "pid", "linux.namespaces[1].type", "pid is given twice"),
    ("linux.namespaces.1.path", "x", "linux.namespaces[1].path", "want an absolute path"),
    (
        "linux.uidMappings",
        [{"containerID": 0, "hostID": 0, "size": 1}],
        "linux.uidMappings",
        "no user namespace",
    ),
    ("linux.devices", [{"path": "/dev/x", "type": "c"}], "linux.devices[0].major", "is missing"),
    ("linux.devices", [{"path": "/dev/x", "type": "q"}], "linux.devices[0].type", "want one of"),
    ("linux.maskedPaths", ["proc"], "linux.maskedPaths[0]", "want an absolute path"),
    ("linux.cgroupsPath", "/a/../b", "linux.cgroupsPath", "must not lead upwards"),
    ("linux.cgroupsPath", "/", "linux.cgroupsPath", "the group of the whole host"),
    ("linux.rootfsPropagation", "none", "linux.rootfsPropagation", "want one of"),
    ("linux.timeOffsets", {"monotonic": {"secs": 1}}, "linux.timeOffsets", "only a new time namespace"),
    ("linux.timeOffsets", {"realtime": {}}, "linux.timeOffsets.realtime", "want monotonic or boottime"),
    ("linux.sysctl", {"kernel.panic": "1"}, "linux.sysctl['kernel.panic']", "would be the host's"),
    (
        "linux.sysctl",
        {"user.max_net_namespaces": "1"},
        "linux.sysctl['user.max_net_namespaces']",
        "no user namespace",
    ),
    ("linux.resources.memory", {"limit": "1g"}, "linux.resources.memory.limit", "want a whole number"),
    ("linux.resources.cpu", {"cpus": "all"}, "linux.resources.cpu.cpus", "want numbers and ranges"),
    (
        "linux.resources.devices",
        [{"access": "x"}],
        "linux.resources.devices[0].access",
        "want letters of rwm",
    ),
    ("linux.resources.unified", {"../x": "1"}, "linux.resources.unified['../x']", "is no controller's file"),
    (
        "linux.resources.unified",
        {"cgroup.procs": "1"},
        "linux.resources.unified['cgroup.procs']",
        "no controller's",
    ),
    ("linux.seccomp", {"defaultAction": "KILL"}, "linux.seccomp.defaultAction", "want one of SCMP_ACT_ALLOW"),
    (
        "linux.seccomp",
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["a"], "action": "SCMP_ACT_KILL", "errnoRet": 1}],
        },
        "linux.seccomp.syscalls[0].errnoRet",
        "has no error number",
    ),
]


ONE = [{"containerID": 0, "hostID": 1, "size": 1}]
NOTIFY = [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
WRONG += [
    ("mounts.0.uidMappings", ONE, "mounts[0].gidMappings", "is missing"),
    ("mounts.0.gidMappings", ONE, "mounts[0].uidMappings", "is missing"),
    ("linux.netDevices", {"eth/0": {}}, "linux.netDevices.eth/0", "is no name of an interface"),
    ("linux.netDevices", {"eth0": {"name": "x" * 16}}, "linux.netDevices.eth0", "is no name of an interface"),
    ("linux.netDevices", {"a": {"name": "b"}, "b": {}}, "linux.netDevices.b", "two interfaces are to be called 'b'"),
    ("process.execCPUAffinity", {"initial": "0-x"}, "process.execCPUAffinity.initial", "want numbers and ranges"),
    ("process.execCPUAffinity", {"final": "3-1"}, "process.execCPUAffinity.final", "has no CPU in it"),
    ("process.execCPUAffinity", {"final": "99999999999"}, "process.execCPUAffinity.final", "want numbers"),
    ("linux.resources.rdma", {"x": {}}, "linux.resources.rdma.x.hcaHandles", "one of them is needed"),
    ("linux.resources.rdma", {"x y": {"hcaHandles": 1}}, "linux.resources.rdma.x y", "is no name"),
    ("linux.resources.rdma", {"x": {"hcaHandles": -1}}, "linux.resources.rdma.x.hcaHandles", "want a number from 0"),
    (
        "linux.resources.blockIO", {"weightDevice": [{"major": 8, "minor": 0}]},
        "linux.resources.blockIO.weightDevice[0].weight", "one of them is needed",
    ),
    ("linux.resources.blockIO", {"leafWeight": 1001}, "linux.resources.blockIO.leafWeight", "want a number from 0"),
    ("linux.resources.memory", {"checkBeforeUpdate": 1}, "linux.resources.memory.checkBeforeUpdate", "want true"),
    (
        "linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": NOTIFY},
        "linux.seccomp.listenerPath", "SCMP_ACT_NOTIFY needs a program to ask",
    ),
    (
        "linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": NOTIFY, "listenerPath": "rel"},
        "linux.seccomp.listenerPath", "want an absolute path",
    ),
    (
        "linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"},
        "linux.seccomp.listenerMetadata", "listenerPath is missing",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "place", "words"), WRONG)
def test_wrong_values(path: str, value: object, place: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(changed(path, value))
    assert caught.value.place == place
    assert words in str(caught.value)


REFUSED: list[tuple[str, object, str]] = [
    ("ociVersion", "2.0.0", "ociVersion"),
    ("vm", {"kernel": {"path": "/x"}}, "vm"),
    ("process.user.username", "root", "process.user.username"),
    ("linux.intelRdt", {"closID": "x"}, "linux.intelRdt"),
    ("linux.namespaces", [], "linux.namespaces"),
    ("linux.personality", {"domain": "LINUX", "flags": ["X"]}, "linux.personality.flags"),
    ("linux.resources.network", {"classID": 1}, "linux.resources.network"),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_NOTIFY"}, "linux.seccomp.defaultAction"),
    (
        "linux.seccomp",
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": "/x",
            "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_NOTIFY"}],
        },
        "linux.seccomp.syscalls[0].names",
    ),
    (
        "linux.seccomp",
        {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW_ONE"]},
        "linux.seccomp.flags[0]",
    ),
    ("linux.memoryPolicy", {"mode": "MPOL_BIND"}, "linux.memoryPolicy"),
    ("linux.uidMappings", [{"containerID": 1, "hostID": 1, "size": 1}], "linux.uidMappings"),
]


@pytest.mark.parametrize(("path", "value", "place"), REFUSED)
def test_refused_by_name(path: str, value: object, place: str) -> None:
    document = changed(path, value)
    if path == "linux.namespaces":
        document["hostname"] = ""
    if path == "linux.uidMappings":
        document["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 1, "size": 1}]
        document["linux"]["namespaces"].append({"type": "user"})
    with pytest.raises(Unsupported) as caught:
        read_spec(document)
    assert caught.value.place == place


@pytest.mark.parametrize("name", ["hostname", "domainname"])
def test_names_need_a_namespace(name: str) -> None:
    document = changed("linux.namespaces", [{"type": "mount"}])
    document |= {"hostname": "", name: "x"}
    with pytest.raises(SpecError, match=f"{name}: would be the host's"):
        read_spec(document)


def test_what_the_specification_does_not_know_is_ignored() -> None:
    document = changed("linux.something", {"new": 1})
    document["process"]["more"] = [1]
    read_spec(document)


def test_capabilities_that_nobody_knows_are_named_and_not_granted() -> None:
    process = read_spec(changed("process.capabilities", {"bounding": ["CAP_CHOWN", "CAP_NEW"]})).process
    assert process is not None
    assert process.capabilities is not None
    assert process.capabilities["bounding"] == 1
    (told,) = process.unknown_capabilities
    assert told.startswith("process.capabilities.bounding[1]: 'CAP_NEW' is not a capability")


def test_null_is_not_there() -> None:
    spec = read_spec(changed("process.capabilities", None))
    assert spec.process is not None
    assert spec.process.capabilities is None


def test_whole_floats_are_numbers() -> None:
    """Some programs that write JSON have no other ones."""
    spec = read_spec(changed("process.user.uid", 1000.0))
    assert spec.process is not None
    assert spec.process.user.uid == 1000


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("net.ipv4.ip_forward", "network"), ("net/ipv4/conf/eth0.1/forwarding", "network"), ("kernel.sem", "ipc"),
        ("kernel/shmmax", "ipc"), ("fs.mqueue.msg_max", "ipc"), ("kernel.domainname", "uts"),
        ("kernel.hostname", None), ("kernel.core_pattern", None), ("vm.swappiness", None), ("network", None),
    ],
)  # fmt: skip
def test_sysctls_and_their_namespaces(key: str, kind: str | None) -> None:
    assert sysctl_namespace(key) == kind


@pytest.mark.parametrize("document", [None, 1, "x", [], {}, {"ociVersion": "1.0.0"}])
def test_documents_that_are_none(document: object) -> None:
    with pytest.raises(SpecError):
        read_spec(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    "root", "process", "process.user", "process.rlimits", "process.capabilities", "process.scheduler", "mounts",
    "mounts.1.options", "hooks", "hooks.prestart", "linux", "linux.namespaces", "linux.devices", "linux.resources",
    "linux.resources.memory", "linux.resources.cpu", "linux.resources.devices", "linux.seccomp", "linux.sysctl",
    "annotations", "linux.timeOffsets", "linux.personality",
]  # fmt: skip


@given(place=st.sampled_from(PLACES), value=JSON)
def test_whatever_stands_somewhere_is_read_or_complained_of(place: str, value: object) -> None:
    with suppress(SpecError):
        read_spec(changed(place, value))


JOINED: dict[str, Any] = {
    "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["sh"], "cwd": "/"},
    "linux": {"namespaces": [{"type": "mount", "path": "/proc/1/ns/mnt"}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"mounts": [{"destination": "/x", "type": "tmpfs"}]}, "mounts"),
        ({"root": {"path": "rootfs", "readonly": True}}, "root.readonly"),
        ({"linux": JOINED["linux"] | {"maskedPaths": ["/x"]}}, "linux.maskedPaths"),
        ({"linux": JOINED["linux"] | {"devices": [{"path": "/x", "type": "p"}]}}, "linux.devices"),
    ],
)
def test_a_mount_namespace_that_is_joined_stays_as_it_is(part: dict[str, Any], place: str) -> None:
    read_spec(JOINED)
    with pytest.raises(SpecError, match=f"{place}: would change the mount namespace"):
        read_spec(JOINED | part)


def test_interfaces_need_a_network() -> None:
    document = changed("linux.netDevices", {"eth0": {}})
    assert read_spec(document).linux.net_devices == (("eth0", "eth0"),)
    document["linux"]["namespaces"] = [{"type": "mount"}, {"type": "uts"}]
    with pytest.raises(SpecError, match=r"linux\.netDevices: the container has no network namespace"):
        read_spec(document)

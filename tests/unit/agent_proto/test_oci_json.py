"""OCI JSON to messages and back: nothing of a specification is lost or invented on the way."""

from __future__ import annotations

import pytest

from agent_proto.gen import oci_pb2
from agent_proto.oci_json import OciError, fill, to_json

SPEC = {
    "ociVersion": "1.1.0",
    "hostname": "h",
    "process": {
        "terminal": False,
        "user": {"uid": 0, "gid": 7, "additionalGids": [1, 2], "umask": 0},
        "args": ["sh", "-c", "true"],
        "env": ["A=b"],
        "cwd": "/",
        "capabilities": {
            "bounding": ["CAP_KILL"],
            "effective": [],
            "inheritable": [],
            "permitted": [],
            "ambient": [],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 0, "soft": 0}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
    },
    "root": {"path": "rootfs", "readonly": False},
    "mounts": [{"destination": "/proc", "source": "proc", "type": "proc", "options": ["nosuid"]}],
    "annotations": {"a": "b"},
    "linux": {
        "uidMappings": [{"hostID": 0, "containerID": 0, "size": 1}],
        "sysctl": {"net.x": "1"},
        "cgroupsPath": "/x",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 0, "fileMode": 438}],
        "maskedPaths": ["/proc/kcore"],
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {"limit": 1 << 40, "disableOOMKiller": True},
            "cpu": {"shares": 2, "quota": -1, "period": 100000, "cpus": "0-1"},
            "pids": {"limit": 9},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 0,
                    "args": [{"index": 0, "value": 1 << 63, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
    },
}


def test_a_specification_comes_back_as_it_was() -> None:
    message = oci_pb2.Spec()
    fill(message, SPEC, "spec")
    assert to_json(message) == SPEC


def test_unknown_keys_and_nulls_are_left_out() -> None:
    message = oci_pb2.Process()
    fill(message, {"args": ["x"], "cwd": "/", "scheduler": {"policy": "x"}, "env": None}, "process")
    assert to_json(message) == {"terminal": False, "args": ["x"], "cwd": "/"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"args": "sleep"}, "p.args: want an array, got str"),
        ({"args": [1]}, "p.args: "),
        ({"user": 3}, "p.user: want an object, got int"),
        ({"rlimits": [{"hard": -1}]}, "p.rlimits[0].hard: "),
        ({"oomScoreAdj": "x"}, "p.oomScoreAdj: "),
    ],
)
def test_wrong_types_are_named_by_their_path(raw: dict[str, object], words: str) -> None:
    with pytest.raises(OciError) as caught:
        fill(oci_pb2.Process(), raw, "p")
    assert str(caught.value).startswith(words)

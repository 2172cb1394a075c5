from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_proto.gen import oci_pb2 as oci
from agent_proto.oci_json import to_json
from guest_agent.jsontext import dumps
from guest_agent.oci import spec_to_json

GOLDEN = Path(__file__).parent / "data" / "config.json"


def full_spec() -> oci.Spec:
    """Every field of the specification, each with a value of its own."""
    hook = oci.Hook(Path="/h", Args=["h", "-v"], Env=["A=b"], Timeout=7)
    devices = [
        oci.LinuxDevice(Path="/dev/x", Type="c", Major=10, Minor=0, FileMode=0o660, UID=1, GID=2),
        oci.LinuxDevice(Path="/dev/fifo", Type="p"),
    ]
    throttle = [oci.LinuxThrottleDevice(Major=8, Minor=0, Rate=1000)]
    resources = oci.LinuxResources(
        Devices=[
            oci.LinuxDeviceCgroup(Allow=False, Access="rwm"),
            oci.LinuxDeviceCgroup(Allow=True, Type="c", Major=1, Minor=3, Access="r"),
        ],
        Memory=oci.LinuxMemory(
            Limit=1, Reservation=2, Swap=-1, Kernel=4, KernelTCP=5, Swappiness=6, DisableOOMKiller=True
        ),
        CPU=oci.LinuxCPU(Shares=1, Quota=-1, Period=3, RealtimeRuntime=4, RealtimePeriod=5, Cpus="0-1", Mems="0"),
        Pids=oci.LinuxPids(Limit=-1),
        BlockIO=oci.LinuxBlockIO(
            Weight=1, LeafWeight=2, WeightDevice=[oci.LinuxWeightDevice(Major=8, Minor=0, Weight=3, LeafWeight=4)],
            ThrottleReadBpsDevice=throttle, ThrottleWriteBpsDevice=throttle, ThrottleReadIOPSDevice=throttle,
            ThrottleWriteIOPSDevice=throttle,
        ),
        HugepageLimits=[oci.LinuxHugepageLimit(Pagesize="2MB", Limit=0)],
        Network=oci.LinuxNetwork(ClassID=1, Priorities=[oci.LinuxInterfacePriority(Name="eth0", Priority=2)]),
    )  # fmt: skip
    denied = oci.LinuxSyscall(
        Names=["mount"], Action="SCMP_ACT_ERRNO", errnoret=0,
        Args=[oci.LinuxSeccompArg(Index=0, Value=2**64 - 1, ValueTwo=0, Op="SCMP_CMP_EQ")],
    )  # fmt: skip
    return oci.Spec(
        Version="1.1.0",
        Process=oci.Process(
            Terminal=True, ConsoleSize=oci.Box(Height=24, Width=80),
            User=oci.User(UID=0, GID=5, AdditionalGids=[0, 7], Username="u"), Args=["sh", ""], Env=["A=1"], Cwd="/",
            Capabilities=oci.LinuxCapabilities(Bounding=["CAP_KILL"]),
            Rlimits=[oci.POSIXRlimit(Type="RLIMIT_CORE", Hard=2**64 - 1, Soft=0)], NoNewPrivileges=True,
            ApparmorProfile="a", OOMScoreAdj=-5, SelinuxLabel="s",
        ),
        Root=oci.Root(Path="/r"),
        Hostname="h",
        Mounts=[oci.Mount(destination="/proc", source="proc", type="proc", options=["ro"])],
        Hooks=oci.Hooks(
            Prestart=[hook], Poststart=[hook], Poststop=[hook], CreateRuntime=[hook], CreateContainer=[hook],
            StartContainer=[hook],
        ),
        Annotations={"k": "v", "empty": ""},
        Linux=oci.Linux(
            UIDMappings=[oci.LinuxIDMapping(HostID=0, ContainerID=1, Size=2)],
            GIDMappings=[oci.LinuxIDMapping(HostID=3, ContainerID=0, Size=2)],
            Sysctl={"net.x": "1"}, Resources=resources, CgroupsPath="/c",
            Namespaces=[oci.LinuxNamespace(Type="pid"), oci.LinuxNamespace(Type="ipc", Path="/p")],
            Devices=devices,
            Seccomp=oci.LinuxSeccomp(
                DefaultAction="SCMP_ACT_ALLOW", Architectures=["SCMP_ARCH_X86_64"], Flags=["SECCOMP_FILTER_FLAG_LOG"],
                Syscalls=[denied, oci.LinuxSyscall(Names=["x"], Action="SCMP_ACT_LOG")],
            ),
            RootfsPropagation="shared", MaskedPaths=["/m"], ReadonlyPaths=["/ro"], MountLabel="l",
            IntelRdt=oci.LinuxIntelRdt(L3CacheSchema="L3"),
        ),
    )  # fmt: skip


def test_a_full_specification_is_the_golden_file() -> None:
    assert json.loads(dumps(spec_to_json(full_spec()))) == json.loads(GOLDEN.read_text())


def test_every_field_of_the_protocol_is_mapped() -> None:
    """An empty field and a full one differ in the JSON, for every field that a container can have."""
    spec = full_spec()
    outside = {"Solaris", "Windows"}

    def check(message: Any) -> None:
        for field in message.DESCRIPTOR.fields:
            if field.name in outside:
                continue
            value = getattr(message, field.name)
            if not hasattr(value, "DESCRIPTOR") and not value:
                continue
            without = type(message)()
            without.CopyFrom(message)
            without.ClearField(field.name)
            assert to_json(without) != to_json(message), f"{message.DESCRIPTOR.name}.{field.name}"
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                for item in [value] if hasattr(value, "DESCRIPTOR") else value:
                    check(item)

    check(spec)


def test_the_version_is_one_that_every_engine_takes() -> None:
    assert spec_to_json(oci.Spec(Version="1.3.0"))["ociVersion"] == "1.0.2"


def test_an_empty_specification() -> None:
    assert spec_to_json(oci.Spec()) == {"ociVersion": "1.0.2"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (oci.Process(), {"terminal": False, "args": [], "cwd": ""}),
        (oci.User(), {"uid": 0, "gid": 0}),
        (oci.LinuxMemory(), {}),
        (oci.LinuxCPU(Quota=-1), {"quota": -1}),
        (oci.LinuxDevice(Path="/dev/b", Type="b"), {"path": "/dev/b", "type": "b", "major": 0, "minor": 0}),
        (oci.LinuxSyscall(Names=["a"], Action="X"), {"names": ["a"], "action": "X"}),
        (
            oci.LinuxSyscall(Names=["a"], Action="X", errnoret=0),
            {"names": ["a"], "action": "X", "errnoRet": 0},
        ),
        (
            oci.LinuxCapabilities(),
            {"bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []},
        ),
    ],
)
def test_zero_values(message: Any, expected: dict[str, Any]) -> None:
    assert to_json(message) == expected

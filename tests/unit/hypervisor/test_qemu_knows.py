"""Every type and property of the golden command lines, looked up in real QEMUs.

They are the host's own, and those of other Debian releases if packaging/qemu_versions.py has fetched them, as
`make test` lets it. No guest runs: QEMU is asked what it knows, or stops before the first instruction (`-S`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import qemu_versions

from hypervisor.arch import MACHINES, arch_named
from hypervisor.errors import HostUnsupported
from hypervisor.qemu.capabilities import demand
from hypervisor.qemu.cmdline import RARE_PROPERTIES, Fds, build_cmdline
from hypervisor.qemu.vfio import blamed
from tests.unit.hypervisor.test_golden import CASES, read_case

FETCHED = Path(__file__).parents[3] / "build" / "cache" / "debian"
HOST = "host"
LIMIT_S = 60
# Names that QEMU's command line has beside a type's own properties.
OF_ALL_DEVICES = {"id", "bus", "addr", "driver"}
OF_ALL_OBJECTS = {"id"}
# Devices that only newer QEMUs have, and the first that does.
TOO_NEW = {"virtio-mem-ccw": (10, 0)}
# What came with opening devices of the host one by one, and the first QEMU that does.
OWN_FILES, OWN_FILES_SINCE = {"iommufd", "fd"}, (9, 0)
# What protects a guest, and the first QEMU that has it. The last one is only in emulators that are made on a Z.
PROTECTIONS: dict[str, tuple[int, int] | None] = {
    "tdx-guest": (10, 1),
    "sev-snp-guest": (9, 1),
    "s390-pv-guest": None,
}


def programs() -> list[tuple[str, str, str]]:
    """Where from, architecture and program of every QEMU that there is."""
    found = []
    for arch in map(arch_named, MACHINES.values()):
        if own := shutil.which(arch.qemu_binary):
            found.append((HOST, arch.name, own))
        fetched = sorted(FETCHED.glob(f"*/{arch.qemu_binary}"))
        found += [(path.parent.name, arch.name, str(path)) for path in fetched]
    return found


PROGRAMS = programs()
PAIRS = [
    pytest.param(path, case, id=f"{source}-{arch}-{case.stem}")
    for source, arch, path in PROGRAMS
    for case in CASES
    if case.parent.name == arch
]


def ask(program: str, *commands: tuple[str, dict[str, str]]) -> list[Any]:
    """The answers to QMP commands; None for one that was refused."""
    lines = [("qmp_capabilities", {}), *commands, ("quit", {})]
    text = "".join(json.dumps({"execute": name, "arguments": words}) + "\n" for name, words in lines)
    argv = [
        program,
        "-machine",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-qmp",
        "stdio",
    ]
    # Into a file: of what a full pipe does not take yet a QEMU that quits forgets the rest.
    with tempfile.TemporaryFile("w+") as said:
        subprocess.run(argv, input=text, stdout=said, text=True, timeout=LIMIT_S, check=True)
        said.seek(0)
        answers = [json.loads(line) for line in said]
    kept = [answer.get("return") for answer in answers if "return" in answer or "error" in answer]
    return kept[1 : 1 + len(commands)]


class Knowledge:
    """What one program says about itself."""

    def __init__(self, program: str) -> None:
        types, machines, version = ask(
            program, ("qom-list-types", {}), ("query-machines", {}), ("query-version", {})
        )
        self.types = {entry["name"] for entry in types}
        self.machines = {name: m["name"] for m in machines for name in (m["name"], m.get("alias"))}
        self.version = (version["qemu"]["major"], version["qemu"]["minor"])
        self._program = program
        self._properties: dict[tuple[str, str], set[str]] = {}

    def properties(self, command: str, typename: str) -> set[str]:
        key = (command, typename)
        if key not in self._properties:
            (answer,) = ask(self._program, (command, {"typename": typename}))
            self._properties[key] = {entry["name"] for entry in answer or ()}
        return self._properties[key]


knowledge = cache(Knowledge)


def split(value: str) -> tuple[str, set[str]]:
    """Head and property names of `head,key=value,...`; a doubled comma belongs to a value. Objects can be JSON, too."""
    if value.startswith("{"):
        found = json.loads(value)
        return found.pop("qom-type"), set(found)
    head, *words = re.split(r"(?<!,),(?!,)", value.replace(",,", "\0"))
    return head, {word.partition("=")[0] for word in words}


def options(case: Path, name: str) -> list[str]:
    argv = build_cmdline(*read_case(case))
    return [value for switch, value in pairwise(argv) if switch == name]


@pytest.mark.parametrize("arch", MACHINES.values())
@pytest.mark.parametrize("suite", qemu_versions.SUITES)
def test_the_qemu_of_each_release_is_looked_at(suite: str, arch: str) -> None:
    if suite == qemu_versions.hosts_own():
        suite = HOST
    there = (suite, arch) in {(source, name) for source, name, _program in PROGRAMS}
    if not there and "KATA_PY_TEST_ALL_QEMUS" not in os.environ:
        pytest.skip(f"no QEMU of {suite} for {arch} here; packaging/qemu_versions.py fetches it")
    assert there


@pytest.mark.parametrize(("program", "case"), PAIRS)
def test_types_and_properties_exist(program: str, case: Path) -> None:
    known = knowledge(program)
    for value in options(case, "-device"):
        driver, names = split(value)
        if driver in TOO_NEW and known.version < TOO_NEW[driver]:
            assert driver not in known.types
            continue
        assert driver in known.types
        if driver == "vfio-pci" and known.version < OWN_FILES_SINCE:
            names -= OWN_FILES
        has = known.properties("device-list-properties", driver) | OF_ALL_DEVICES
        # Refused before the start (test_capabilities). A QEMU that has it shows here.
        rare = {name for owner, name in RARE_PROPERTIES if owner == driver}
        assert not rare & has
        assert names <= has | rare, value
    for value in options(case, "-object"):
        qom_type, names = split(value)
        if qom_type in PROTECTIONS and not has_protection(known, qom_type):
            assert qom_type not in known.types
            continue
        if qom_type == "iommufd":
            assert (qom_type in known.types) is (known.version >= OWN_FILES_SINCE)
            if qom_type not in known.types:
                continue
        assert qom_type in known.types
        assert names <= known.properties("qom-list-properties", qom_type) | OF_ALL_OBJECTS, value
    (machine,) = options(case, "-machine")
    name, names = split(machine)
    properties = known.properties("qom-list-properties", f"{known.machines[name]}-machine")
    assert names <= properties | {"hpet", "vmport"}, machine
    for accel in options(case, "-accel"):
        assert f"{split(accel)[0]}-accel" in known.types | {"kvm-accel"}


def has_protection(known: Knowledge, qom_type: str) -> bool:
    first = PROTECTIONS[qom_type]
    return first is not None and known.version >= first


PROTECTED = [pair for pair in PAIRS if read_case(Path(str(pair.values[1])))[0].protection is not None]


@pytest.mark.parametrize(("program", "case"), PROTECTED)
def test_qemu_takes_the_protection_and_lacks_only_its_hardware(program: str, case: Path) -> None:
    """Its values too: an object that QEMU could not have made would be named."""
    (value,) = (value for value in options(case, "-object") if split(value)[0] in PROTECTIONS)
    spec, _ = read_case(case)
    assert spec.protection is not None
    machine = f"{arch_named(spec.arch).machine},confidential-guest-support={spec.protection.id}"
    argv = [program, "-accel", "tcg", "-machine", machine]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-object", value]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    qom_type = split(value)[0]
    if has_protection(knowledge(program), qom_type):
        assert f"cannot set up private guest memory for {qom_type}: KVM required" in done.stderr
    else:
        assert re.search(f"invalid object type: {qom_type}|does not accept value '{qom_type}'", done.stderr)
    assert done.returncode == 1


WITH_HOST_DEVICES = [pair for pair in PAIRS if read_case(Path(str(pair.values[1])))[0].host_devices]


@pytest.mark.parametrize(("program", "case"), WITH_HOST_DEVICES)
def test_qemu_takes_the_ports_and_lacks_only_the_devices_of_the_host(
    program: str, case: Path, tmp_path: Path
) -> None:
    """What it says then is told in one line, by the device."""
    spec, fds = read_case(case)
    known = knowledge(program)
    of_groups = [device for device in spec.host_devices if device.own_file is None]
    if not of_groups and known.version < OWN_FILES_SINCE:
        with pytest.raises(HostUnsupported, match=r"iommufd.*install QEMU 9\.0 or later"):
            asyncio.run(demand([program, *build_cmdline(spec, fds)[1:]], tmp_path))
        return
    own_files = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
    try:
        if not of_groups:
            fds = replace(fds, iommufd=own_files[0], host_devices=tuple(own_files[1:]))
        spec = replace(spec, accel="tcg", iommu=False)
        argv = build_cmdline(spec, fds)
        switches = [
            word
            for switch, value in pairwise(argv)
            if switch in ("-device", "-object") and re.match("vfio|pc|x3|xio|iommufd", value)
            for word in (switch, value)
        ]
        machine = ["-machine", arch_named(spec.arch).machine, "-nodefaults", "-display", "none", "-S"]
        done = subprocess.run(
            [program, *machine, *switches], pass_fds=own_files,
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    finally:
        for fd in own_files:
            os.close(fd)
    assert done.returncode == 1
    first = spec.host_devices[0]
    line = blamed(done.stderr.splitlines(), argv, spec.host_devices)
    assert line.startswith(f"QEMU cannot open device {first.address} of the host ({first.file}): "), (
        done.stderr
    )
    assert line.endswith(
        "; no other program may have it open, and all of its group has to be bound to vfio-pci; "
        "`kata-py check` looks"
    )


def linux_like(path: Path, arch: str) -> Path:
    """A file that QEMU takes for a kernel: for a PC the header of a bzImage, elsewhere anything."""
    content = bytearray(64 * 1024)
    if arch == "x86_64":
        content[0x1F1] = 1  # sectors of set-up code
        struct.pack_into("<H", content, 0x1FE, 0xAA55)
        content[0x202:0x206] = b"HdrS"
        struct.pack_into("<H", content, 0x206, 0x20C)  # boot protocol 2.12
        content[0x211] = 1  # loaded high
        struct.pack_into("<I", content, 0x22C, 0x7FFFFFFF)  # highest address of an initrd
    path.write_bytes(content)
    return path


def sized(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


EMULATED = [pair for pair in PAIRS if read_case(Path(str(pair.values[1])))[0].accel == "tcg"]


@pytest.mark.parametrize(("program", "case"), EMULATED)
def test_qemu_accepts_the_command_line(program: str, case: Path, tmp_path: Path) -> None:
    """Up to its monitor. What has another process at its other end is left out, as are files of the example."""
    known = knowledge(program).types
    if lacking := [
        device for device in TOO_NEW if device not in known and device in str(options(case, "-device"))
    ]:
        pytest.skip(f"this QEMU has no {lacking[0]}")
    spec, _ = read_case(case)
    flash = {"x86_64": 2**20, "aarch64": 64 * 2**20}
    spec = replace(
        spec,
        run_dir=tmp_path,
        qemu_path=Path(program),
        kernel=linux_like(tmp_path / "vmlinux", spec.arch),
        initrd=sized(tmp_path / "initrd", 4096) if spec.initrd else None,
        image=sized(tmp_path / "image", spec.image_bytes or 2**20) if spec.image else None,
        image_initrd=sized(tmp_path / "image-initrd", 4096) if spec.image_initrd else None,
        extensions=tuple(
            replace(extension, image=sized(tmp_path / extension.image.name, 2**20))
            for extension in spec.extensions
        ),
        firmware=sized(tmp_path / "firmware", 2**20) if spec.firmware else None,
        pflash=tuple(sized(tmp_path / f"flash{i}", flash[spec.arch]) for i, _ in enumerate(spec.pflash)),
        memory_dir=tmp_path if spec.memory_dir else None,
        memory_prealloc=False,
        hugepages=False,
        numa=tuple(replace(node, host_nodes=(0,)) for node in spec.numa),  # there is one everywhere
        vsock=None,
        shares=(),
        exports=tuple(replace(export, directory=tmp_path) for export in spec.exports),
        nics=(),
    )
    ours, guests = socket.socketpair()
    initdata = sized(tmp_path / "initdata", 512).open("rb")
    with (
        ours, guests, initdata, socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client
    ):  # fmt: skip
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        fds = Fds(qmp=listener.fileno(), console=guests.fileno(), initdata=initdata.fileno())
        argv = [*build_cmdline(spec, fds), "-S"]
        with subprocess.Popen(argv, pass_fds=fds.all(), stderr=subprocess.PIPE, text=True) as qemu:
            try:
                client.settimeout(LIMIT_S)
                client.connect(str(tmp_path / "qmp"))
                listener.close()  # ours: a QEMU that ends then ends the connection
                client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
                while client.recv(65536):
                    pass
            except ConnectionResetError:
                pass  # QEMU ended before it took the connection
            finally:
                _, said = qemu.communicate(timeout=LIMIT_S)
    problems = [line for line in said.splitlines() if "warning:" not in line]
    assert (qemu.returncode, problems) == (0, [])

"""Rules about devices: as lines for version 1, and as a program, run here by a small machine of the test's own."""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from oci_engine.cgroups.device_program import assemble
from oci_engine.cgroups.device_rules import complete, v1_lines
from oci_engine.devices import make_device
from oci_engine.linux_spec import Device
from oci_engine.resources_spec import DeviceRule

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

KINDS = {"b": 1, "c": 2}
ACCESS = {"m": 1, "r": 2, "w": 4}
RULES = st.lists(
    st.builds(
        DeviceRule,
        allow=st.booleans(),
        type=st.sampled_from("abc"),
        major=st.none() | st.integers(0, 2),
        minor=st.none() | st.integers(0, 2),
        access=st.text(alphabet="rwm", min_size=1, max_size=3),
    ),
    max_size=8,
).map(tuple)


def execute(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """The instructions that linux/bpf.h describes, as far as the program uses them."""
    context = struct.pack("=III", access << 16 | kind, major, minor)
    registers = [0] * 11
    code = [struct.unpack_from("=BBhi", program, place) for place in range(0, len(program), 8)]
    counter = 0
    while True:
        operation, both, offset, number = code[counter]
        counter += 1
        to, source = both & 15, both >> 4
        value = number & 0xFFFFFFFF
        match operation:
            case 0x61:
                registers[to] = struct.unpack_from("=I", context, offset)[0]
            case 0xBC:
                registers[to] = registers[source]
            case 0xB4:
                registers[to] = value
            case 0x54:
                registers[to] &= value
            case 0x74:
                registers[to] >>= value
            case 0x56:
                counter += offset * (registers[to] != value)
            case 0x46:
                counter += offset * bool(registers[to] & value)
            case 0x05:
                counter += offset
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"operation {operation:#x}")


def allowed(rules: tuple[DeviceRule, ...], kind: str, letter: str, major: int, minor: int) -> bool:
    """The last rule that speaks of it decides."""
    for rule in reversed(rules):
        if (
            rule.type in ("a", kind) and rule.major in (None, major) and rule.minor in (None, minor)
            and letter in rule.access
        ):  # fmt: skip
            return rule.allow
    return False


@given(
    RULES,
    st.sampled_from("bc"),
    st.sets(st.sampled_from("rwm"), min_size=1),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_the_program_decides_as_the_rules_do(
    rules: tuple[DeviceRule, ...], kind: str, letters: set[str], major: int, minor: int
) -> None:
    answer = execute(assemble(rules), KINDS[kind], sum(ACCESS[each] for each in letters), major, minor)
    assert bool(answer) == all(allowed(rules, kind, each, major, minor) for each in letters)


def test_large_numbers() -> None:
    rule = DeviceRule(allow=True, type="c", major=0xFFFFFFFF, minor=0x80000000, access="r")
    assert execute(assemble((rule,)), 2, 2, 0xFFFFFFFF, 0x80000000) == 1
    assert execute(assemble((rule,)), 2, 2, 0xFFFFFFFF, 0) == 0


def test_default_devices_are_always_usable_and_nothing_else() -> None:
    program = assemble(complete(()))
    for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 77)):
        assert execute(program, 2, 6, major, minor) == 1
    for kind, major, minor in ((1, 8, 0), (2, 1, 1), (2, 1, 11), (2, 10, 229)):
        assert execute(program, kind, 2, major, minor) == 0
        assert execute(program, kind, 1, major, minor) == 1  # to make the file is harmless


def test_lines_of_version_1() -> None:
    rules = (
        DeviceRule(allow=False, type="a", major=None, minor=None, access="rwm"),
        DeviceRule(allow=True, type="c", major=10, minor=None, access="rw"),
        DeviceRule(allow=True, type="a", major=7, minor=1, access="r"),
        DeviceRule(allow=False, type="b", major=None, minor=None, access="m"),
    )
    assert v1_lines(rules) == [
        ("devices.deny", "a"), ("devices.allow", "c 10:* rw"), ("devices.allow", "b 7:1 r"),
        ("devices.allow", "c 7:1 r"), ("devices.deny", "b *:* m"),
    ]  # fmt: skip


def test_a_link_in_the_place_of_a_new_device_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container with the same root file system may put one there."""
    hosts = tmp_path / "hosts"
    hosts.touch(0o600)
    chown = os.chown

    def replaced(name: str, uid: int, gid: int, *, dir_fd: int, follow_symlinks: bool) -> None:
        assert stat.S_IMODE(os.stat(name, dir_fd=dir_fd).st_mode) == 0o666  # whatever the umask is
        os.unlink(name, dir_fd=dir_fd)
        os.symlink(hosts, name, dir_fd=dir_fd)
        chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "chown", replaced)
    (tmp_path / "rootfs").mkdir()
    root = os.open(tmp_path / "rootfs", os.O_RDONLY)
    device = Device(
        path="/dev/fifo", type="p", major=0, minor=0, mode=0o666, uid=os.getuid(), gid=os.getgid()
    )
    make_device(root, device, bind=False)
    os.close(root)
    assert stat.S_IMODE(hosts.stat().st_mode) == 0o600

"""For which machine a container's program is, and what happens when that is not the one that boots."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from agent_proto.gen import oci_pb2
from config import ConfigError
from config.errors import Problem
from hypervisor.errors import HostUnsupported
from shim import architecture
from shim.errors import GuestUnreachable, InvalidRequest
from shim.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

X86, ARM, S390 = "q35", "virt", "s390-ccw-virtio"


def elf(machine: int, *, bits: int = 64, big: bool = False) -> bytes:
    """The beginning of a program."""
    ident = b"\x7fELF" + bytes([bits // 32, 2 if big else 1, 1]) + bytes(9)
    return ident + b"\0\2" + machine.to_bytes(2, "big" if big else "little") + bytes(44)


AMD64, ARM64, S390X = elf(62), elf(183), elf(22, big=True)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (AMD64, X86),
        (elf(3, bits=32), X86),
        (elf(62, bits=32), X86),
        (ARM64, ARM),
        (elf(40, bits=32), ARM),
        (S390X, S390),
        (elf(22, bits=32, big=True), None),  # no kernel runs 31-bit programs any more
        (elf(22), None),  # s390x of the wrong byte order
        (elf(243), None),
        (AMD64[:19], None),
        (b"\x7fELF", None),
        (b"MZ" + bytes(200), None),
        (b"", None),
        (b"\xff" * 256, None),
    ],
)
def test_headers(head: bytes, expected: str | None) -> None:
    assert architecture.of_header(head) == expected


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system, with a file outside of it that nothing may find."""
    (tmp_path / "outside").write_bytes(S390X)
    for name in ("bin", "usr/bin", "work"):
        (tmp_path / "root" / name).mkdir(parents=True)
    return tmp_path / "root"


def process(*args: str, path: str = "PATH=/usr/bin:/bin", cwd: str = "/work") -> oci_pb2.Process:
    return oci_pb2.Process(Args=args, Env=["A=PATH=/x", path], Cwd=cwd)


def found(root: Path, *args: str, **more: str) -> str | None:
    return architecture.machine_type_for(str(root), process(*args, **more))


def test_the_program_is_where_the_kernel_would_find_it(root: Path) -> None:
    (root / "bin" / "tool").write_bytes(ARM64)
    (root / "work" / "mine").write_bytes(S390X)
    assert found(root, "tool") == ARM
    assert found(root, "/bin/tool", "-x") == ARM
    assert found(root, "../bin/tool") == ARM
    assert found(root, "./mine") == S390
    assert found(root, "mine") is None
    assert found(root, "mine", path="PATH=") == S390  # an empty entry is the working directory
    assert found(root, "tool", path="NOPATH=1") == ARM
    (root / "usr" / "bin" / "tool").write_bytes(AMD64)
    assert found(root, "tool") == X86


def test_links_stay_inside(root: Path) -> None:
    (root / "bin" / "real").write_bytes(ARM64)
    (root / "bin" / "absolute").symlink_to("/bin/real")
    (root / "bin" / "out").symlink_to("/../../../../outside")
    (root / "bin" / "up").symlink_to(os.path.relpath(root.parent / "outside", root / "bin"))
    (root / "bin" / "loop").symlink_to("loop")
    assert found(root, "absolute") == ARM
    for name in ("out", "up", "loop"):
        assert found(root, f"/bin/{name}") is None


def test_scripts_are_for_what_their_interpreter_is_for(root: Path) -> None:
    (root / "bin" / "interpreter").write_bytes(ARM64)
    (root / "bin" / "sh").write_bytes(S390X)
    for line, expected in (
        (b"#!/bin/interpreter -x\n", ARM),
        (b"#! /bin/interpreter", ARM),
        (b"#!/bin/absent\n", S390),
        (b"#!\n", S390),
        (b"#!\xff\xfe\0\n", S390),
        (b"echo no interpreter\n", S390),
    ):
        (root / "bin" / "script").write_bytes(line)
        assert found(root, "script") == expected, line


def test_without_a_program_the_shell_tells(root: Path) -> None:
    assert found(root, "from-a-volume") is None
    (root / "bin" / "sh").write_bytes(ARM64)
    for args in (("from-a-volume",), (), ("\0",), ("",)):
        assert found(root, *args) == ARM


def test_what_is_no_file_is_not_opened(root: Path) -> None:
    os.mkfifo(root / "bin" / "fifo")
    (root / "bin" / "folder").mkdir()
    for name in ("fifo", "folder"):
        assert found(root, f"/bin/{name}") is None


@pytest.mark.parametrize(
    ("guest", "host", "kept", "index"),
    [
        (X86, "x86_64", True, 0),
        (ARM, "x86_64", False, 0),
        (S390, "x86_64", False, 1),
        (X86, "s390x", False, 1),
    ],
)
def test_filters(monkeypatch: pytest.MonkeyPatch, guest: str, host: str, kept: bool, index: int) -> None:
    monkeypatch.setattr(architecture, "Host", lambda: SimpleNamespace(arch=host))
    seccomp = oci_pb2.LinuxSeccomp(Architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
    seccomp.Syscalls.add(Names=["clone"], Action="SCMP_ACT_ALLOW").Args.add(Index=0, Value=5)
    seccomp.Syscalls.add(Names=["personality"], Action="SCMP_ACT_ALLOW").Args.add(Index=0, Value=8)
    architecture.fit_seccomp(seccomp, guest)
    assert bool(seccomp.Architectures) is kept
    assert [rule.Args[0].Index for rule in seccomp.Syscalls] == [index, 0]


class FakeBoot:
    """What a sandbox needs of one, until its guest would be up; `done` are the steps that change something."""

    failure = None
    machine_type_set_by: str | None = None
    bundle = None

    def __init__(self) -> None:
        self.done: list[object] = []
        self.config: Any = SimpleNamespace(hypervisor=SimpleNamespace(machine_type=X86))
        self.pod = "the pod"
        self.problem: Exception | None = None

    def planned(self, pod: object, machine_type: str) -> object:
        if self.problem is not None:
            raise self.problem
        return pod, machine_type

    async def replace(self, plan: object) -> None:
        await asyncio.sleep(0)
        self.done.append(plan)

    async def machine(self) -> Any:
        self.done.append("machine")
        return await asyncio.get_running_loop().create_future()

    async def aclose(self) -> None:
        self.done.append("closed")


@pytest.fixture
def boot() -> FakeBoot:
    return FakeBoot()


@asynccontextmanager
async def sandbox(boot: FakeBoot, root: Path, *, outlives: bool = False) -> AsyncIterator[Sandbox]:
    """A sandbox whose machine boots; its containers have `root` for their root file system."""
    share = SimpleNamespace(rootfs=lambda container_id: root)
    made = Sandbox(
        "s1", cast(Any, boot), cast(Any, share), cast(Any, None), namespace="n", outlives_containers=outlives
    )
    made.bring_up()
    await asyncio.sleep(0)
    made._creating.add("c1")
    yield made
    await made.stop()


async def test_the_machine_of_the_first_container_is_replaced(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    async with sandbox(boot, root) as made:
        first = made._up
        await made._suit("c1", process("sh"))
        assert first is not None
        assert first.cancelled()
        await asyncio.sleep(0)
        assert boot.done == ["machine", ("the pod", ARM), "machine"]


class UpGuest:
    """A guest that is up; `done` are the steps of its end."""

    def __init__(self, done: list[object]) -> None:
        self._done = done

    async def retire(self, *, write_out: bool) -> None:
        self._done.append(f"retired, write_out={write_out}")

    async def aclose(self) -> None:
        self._done.append("connection closed")


async def test_nothing_of_a_guest_serves_the_next_one(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    async with sandbox(boot, root) as made:
        made._running = cast(Any, UpGuest(boot.done))
        await made._suit("c1", process("sh"))
        assert not made.is_up
        ended = ["retired, write_out=False", "connection closed"]
        assert boot.done == ["machine", *ended, ("the pod", ARM)]


@pytest.mark.parametrize("head", [AMD64, elf(243), b"?"])
async def test_nothing_happens_to_one_that_fits_or_may_fit(boot: FakeBoot, root: Path, head: bytes) -> None:
    (root / "bin" / "sh").write_bytes(head)
    async with sandbox(boot, root) as made:
        await made._suit("c1", process("sh"))
        assert boot.done == ["machine"]


async def test_a_guest_that_has_ended_is_not_replaced(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    async with sandbox(boot, root) as made:
        made._set_ended(255)
        await made._suit("c1", process("sh"))
        assert boot.done == ["machine"]


@pytest.mark.parametrize(
    ("origin", "neighbour", "outlives", "reason"),
    [
        ("/etc/x.toml", "", False, "machine_type is set by /etc/x.toml; leave it out, or set it to virt"),
        (None, "c0", False, "all containers of a pod are of one architecture"),
        (None, "", True, "annotate the pod with io.katacontainers.config.hypervisor.machine_type: virt"),
    ],
)
async def test_refusals_name_both_architectures_and_the_way_out(
    boot: FakeBoot, root: Path, origin: str | None, neighbour: str, outlives: bool, reason: str
) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    boot.machine_type_set_by = origin
    async with sandbox(boot, root, outlives=outlives) as made:
        if neighbour:
            made._creating.add(neighbour)
        with pytest.raises(
            InvalidRequest, match="c1 is for arm64, the machine of sandbox s1 for amd64"
        ) as caught:
            await made._suit("c1", process("sh"))
        assert reason in str(caught.value)
        assert boot.done == ["machine"]


async def test_a_missing_guest_is_one_line_and_leaves_the_machine(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    boot.problem = ConfigError(
        (
            Problem(Path("/f"), "a.path", "/q does not exist", "install qemu-system-arm"),
            Problem(Path("/f"), "a.kernel", "/k does not exist", "build it"),
            Problem(Path("/f"), "a.initrd", "/i does not exist", "build it"),
        )
    )
    async with sandbox(boot, root) as made:
        with pytest.raises(InvalidRequest) as caught:
            await made._suit("c1", process("sh"))
        assert str(caught.value) == (
            "container c1 is for arm64, and there is no machine for that: /q does not exist (install qemu-system-arm); "
            "/k does not exist (build it)"
        )
        assert boot.done == ["machine"]
        assert made._up is not None
        assert not made._up.done()


async def test_a_host_that_cannot_is_told_with_the_container(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    boot.problem = HostUnsupported('accel = "kvm" cannot work')
    async with sandbox(boot, root) as made:
        with pytest.raises(InvalidRequest, match=r'c1 is for arm64, .*: accel = "kvm" cannot work'):
            await made._suit("c1", process("sh"))
        assert boot.done == ["machine"]


async def test_a_stop_meanwhile_is_not_overtaken(boot: FakeBoot, root: Path) -> None:
    (root / "bin" / "sh").write_bytes(ARM64)
    async with sandbox(boot, root) as made:
        suiting = asyncio.create_task(made._suit("c1", process("sh")))
        await asyncio.sleep(0)
        await made.stop()
        with pytest.raises(GuestUnreachable):
            await suiting
        assert boot.done.count("machine") == 1

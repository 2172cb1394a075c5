"""`start`: what containerd sends, what it reads back, and whom the address leads to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.api.gen import bootstrap_pb2
from tests.support import host
from tests.support.bundles import pod, shell, spec
from tests.support.fake_containerd import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd
    from tests.support.fake_qemu import FakeQemu

SLEEP = shell("exec sleep 100")


@pytest.mark.parametrize("dialect", [Dialect.NOTHING, Dialect.OPTIONS], ids=lambda dialect: dialect.name)
async def test_plain_answer(containerd: FakeContainerd, name: str, dialect: Dialect) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    stdin = containerd.options() if dialect is Dialect.OPTIONS else b""
    answer = await containerd.run("start", name, bundle, stdin=stdin)
    address = f"unix://{containerd.socket_of(name)}"
    assert answer == (0, address.encode(), "")
    assert (bundle / "address").read_text() == address
    socket = containerd.socket_of(name)
    assert (socket.stat().st_mode & 0o777, socket.parent.stat().st_mode & 0o066) == (0o600, 0)
    await containerd.connect(name, bundle, address)


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A folder with a name short enough for a socket's address."""
    with tempfile.TemporaryDirectory(prefix="kata-py-s-") as folder:
        yield Path(folder) / "s"


async def test_bootstrap_params(containerd: FakeContainerd, name: str, socket_dir: Path) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    answer = await containerd.run(
        "start",
        name,
        bundle,
        stdin=containerd.params(name, socket_dir=socket_dir),
        flags=("-bundle", str(bundle)),
    )
    result = bootstrap_pb2.BootstrapResult.FromString(answer.output)
    address = f"unix://{containerd.socket_of(name, socket_dir)}"
    assert (answer.code, result.version, result.address, result.protocol) == (0, 3, address, "ttrpc")
    # Read again when containerd restarts, by code that knows the plain form only.
    assert (bundle / "address").read_text() == address
    shim = await containerd.connect(name, bundle, address, version=3)
    await shim.create()
    await shim.shutdown(now=True)
    assert list(socket_dir.iterdir()) == []


@pytest.mark.parametrize(
    "stdin",
    [b"\xff" * 40, b"\0", b"text\n" * 20000, b"\x0a\x05other"],
    ids=["ff", "zero", "long", "truncated"],
)
async def test_strange_stdin_does_no_harm(containerd: FakeContainerd, name: str, stdin: bytes) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    answer = await containerd.run("start", name, bundle, stdin=stdin)
    assert answer == (0, f"unix://{containerd.socket_of(name)}".encode(), "")
    shim = await containerd.connect(name, bundle, answer.output.decode())
    await shim.create()


async def test_options_name_the_configuration(
    containerd: FakeContainerd, name: str, config: Path, tmp_path: Path, qemu: FakeQemu
) -> None:
    other = tmp_path / "other.toml"
    text = config.read_text()
    config.write_text("[hypervisor.qemu]\nno_such_key = 1\n")  # what the environment names
    other.write_text(text.replace('accel = "tcg"', 'accel = "tcg"\ndefault_memory = 300'))
    bundle = containerd.bundle(name, spec(SLEEP))
    answer = await containerd.run("start", name, bundle, stdin=containerd.options(other))
    shim = await containerd.connect(name, bundle, answer.output.decode())
    await shim.create()
    argv = qemu.argv()
    assert argv[argv.index("-m") + 1].startswith("300M")


async def test_second_start_finds_the_first(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    first = await containerd.start(name, bundle)
    answer = await containerd.run("start", name, bundle)
    assert answer == (0, first.address.encode(), "")
    second = await containerd.connect(name, bundle, first.address)
    assert second.pid == first.pid


@pytest.mark.parametrize("stale", [False, True], ids=["new", "after a crash"])
async def test_parallel_starts_make_one_shim(containerd: FakeContainerd, name: str, stale: bool) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    if stale:
        containerd.socket_of(name).parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(containerd.socket_of(name)))
    answers = await asyncio.gather(*(containerd.run("start", name, bundle) for _ in range(6)))
    address = f"unix://{containerd.socket_of(name)}".encode()
    assert [(answer.code, answer.output) for answer in answers] == [(0, address)] * 6
    await containerd.connect(name, bundle, address.decode())
    daemons = [words for words in host.descendants(os.getpid()).values() if f"-id {name}" in words]
    assert len(daemons) == 1


async def test_container_of_a_pod_joins_the_sandbox(
    containerd: FakeContainerd, agent: FakeAgent, name: str
) -> None:
    bundle = containerd.bundle(name, spec(SLEEP, annotations=pod("sandbox", name)))
    shim = await containerd.start(name, bundle)
    joining = containerd.bundle(f"{name}-app", spec(SLEEP, annotations=pod("container", name)))
    answer = await containerd.run("start", f"{name}-app", joining)
    assert answer == (0, shim.address.encode(), "")
    assert (joining / "address").read_text() == shim.address
    await shim.create()
    await shim.create(f"{name}-app", bundle=joining)
    kinds = [
        (await agent.request("CreateContainer", nth)).OCI.Annotations["io.katacontainers.pkg.oci.container_type"]
        for nth in (1, 2)
    ]  # fmt: skip
    assert kinds == ["pod_sandbox", "pod_container"]


async def test_container_of_a_dead_sandbox(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(f"{name}-app", spec(SLEEP, annotations=pod("container", name)))
    answer = await containerd.run("start", f"{name}-app", bundle)
    assert (answer.code, name in answer.output.decode()) == (1, True)
    assert "not running" in answer.output.decode()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, ["config.json", "No such file"]),
        ('{"annotations": {"io.kubernetes.cri.container-type": ', ["config.json is not an OCI runtime spec"]),
        ('{"annotations": ["io.kubernetes.cri.container-type"]}', ["config.json is not an OCI runtime spec"]),
        (json.dumps({"annotations": pod("container", "../x")}), ["impossible sandbox id '../x'"]),
    ],
    ids=["missing", "cut short", "wrong type", "path as id"],
)
async def test_bad_bundle(
    containerd: FakeContainerd, name: str, tmp_path: Path, config: str | None, words: list[str]
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    if config is not None:
        (bundle / "config.json").write_text(config)
    answer = await containerd.run("start", name, bundle)
    text = answer.output.decode()
    assert answer.code == 1
    assert "\n" not in text
    for word in words:
        assert word in text
    assert sorted(os.listdir(bundle)) == ([] if config is None else ["config.json"])


@pytest.mark.parametrize("bad_id", ["", "a/b", "..", "x" * 256])
async def test_bad_id(containerd: FakeContainerd, tmp_path: Path, bad_id: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    answer = await containerd.run("start", bad_id, tmp_path)
    assert (answer.code, "need -id" in answer.output.decode()) == (1, True)


async def test_id_is_taken_in_another_namespace(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    shim = await containerd.start(name, bundle)
    await shim.create()
    answer = await containerd.run("start", name, bundle, flags=("-namespace", "elsewhere"))
    text = answer.output.decode()
    assert answer.code == 1
    assert "already runs in namespace 'fake'" in text
    assert str(shim.pid) in text
    assert (await shim.call("State")).status == 1  # the first is none the worse for it
    assert not containerd.socket_of(name, namespace="elsewhere").exists()


async def test_socket_of_a_dead_shim_is_replaced(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(SLEEP))
    socket = containerd.socket_of(name)
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.write_text("in the way")
    shim = await containerd.start(name, bundle)
    await shim.create()

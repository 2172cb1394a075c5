"""What a pod's annotations do to the machine that is about to be started, from either description of the pod."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import structlog
from msgspec.structs import replace
from structlog.testing import capture_logs

from config import Config, ConfigError
from config.schema import Qemu
from config.show import decode
from hypervisor import host as hosts
from shim import paths
from shim.boot import Boot
from shim.errors import GuestUnreachable
from shim.plan import plan
from shim.pod import Pod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hypervisor.spec import VmSpec
    from shim.serve import HostState

MEMORY = "io.katacontainers.config.hypervisor.default_memory"


class Host:
    """The host's side of a sandbox, in a folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.share = SimpleNamespace(exported=run_dir / "ro")

    def remember_helpers(self, pids: dict[str, int]) -> None: ...

    def remember_network(self, netns: Path, ifindexes: list[int]) -> None: ...

    def create(self) -> None:
        self.run_dir.mkdir()


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A pod's start on a host with a configuration whose QEMU ends at once."""
    for name in ("qemu", "kernel", "initrd", "virtiofsd"):
        (tmp_path / name).write_text("#!/bin/false\n")
        (tmp_path / name).chmod(0o755)
    names = {"path": "qemu", "kernel": "kernel", "initrd": "initrd", "virtio_fs_daemon": "virtiofsd"}
    lines = "".join(f'{key} = "{tmp_path / name}"\n' for key, name in names.items())
    file = tmp_path / "configuration.toml"
    file.write_text(f'[hypervisor.qemu]\n{lines}enable_annotations = ["default_memory"]\n')
    monkeypatch.setenv("KATA_CONF_FILE", str(file))
    yield SimpleNamespace(id="s1", options=b"", sandbox_api=False, bundle=str(tmp_path), debug=False)
    structlog.reset_defaults()


def boot(bootstrap: SimpleNamespace, folder: Path) -> Boot:
    return Boot(cast(Any, bootstrap), cast("HostState", Host(folder / "run")), 0.0)


def write_bundle(folder: Path, annotations: dict[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps({"annotations": annotations}))


async def test_annotations_of_a_bundle(bootstrap: SimpleNamespace, tmp_path: Path) -> None:
    write_bundle(tmp_path, {MEMORY: "192"})
    found = boot(bootstrap, tmp_path)
    assert found.failure is None
    assert found.config.hypervisor.default_memory == 192
    await found.aclose()


async def test_a_refused_annotation_is_the_boots_failure(bootstrap: SimpleNamespace, tmp_path: Path) -> None:
    write_bundle(tmp_path, {MEMORY: "much", "io.katacontainers.config.runtime.surprise": "1"})
    failure = boot(bootstrap, tmp_path).failure
    assert isinstance(failure, ConfigError)
    assert [line.split(": ")[0] for line in str(failure).splitlines()] == [
        f"annotation {MEMORY}",
        "annotation io.katacontainers.config.runtime.surprise",
    ]


async def test_annotations_of_a_created_sandbox(bootstrap: SimpleNamespace, tmp_path: Path) -> None:
    bootstrap.sandbox_api = True
    found = boot(bootstrap, tmp_path)
    with pytest.raises(ConfigError, match=f"annotation {MEMORY}: "):
        found.launch(Pod(annotations={MEMORY: "much"}))
    found.launch(Pod(annotations={MEMORY: "192"}))
    assert found.config.hypervisor.default_memory == 192
    await found.aclose()


async def test_what_was_decided_is_left_in_the_sandboxs_folder(
    bootstrap: SimpleNamespace, tmp_path: Path
) -> None:
    write_bundle(tmp_path, {MEMORY: "192"})
    found = boot(bootstrap, tmp_path)
    found._record_settings()
    (setting,) = (
        each
        for each in decode((tmp_path / "run" / paths.CONFIG_FILE).read_bytes())
        if each.key == "hypervisor.qemu.default_memory"
    )
    assert (setting.value, setting.origin) == (192, f"annotation {MEMORY}")
    await found.aclose()


async def test_the_machine_has_the_size_of_the_pod(bootstrap: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text(file.read_text() + "[runtime]\nstatic_sandbox_resource_mgmt = true\n")
    write_bundle(tmp_path, {"io.kubernetes.cri.sandbox-memory": str(128 << 20)})
    found = boot(bootstrap, tmp_path)
    assert (found.failure, found.config.hypervisor.default_memory) == (None, 128)
    await found.aclose()


def add(folder: Path, text: str) -> None:
    file = folder / "configuration.toml"
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize(
    ("text", "debug", "least"),
    [
        ("", False, "info"),
        ("[runtime]\nlog_level = 'error'\n", False, "info"),
        ("log_level = 'warn'\n[runtime]\nlog_level = 'error'\n", False, "warning"),
        ("enable_debug = true\n", False, "debug"),
        ("[runtime]\nenable_debug = true\n", False, "debug"),
        ("[runtime]\nlog_level = 'trace'\n", False, "debug"),
        ("log_level = 'critical'\n[runtime]\nlog_level = 'error'\n", True, "debug"),
    ],
)
async def test_levels_of_the_log(
    bootstrap: SimpleNamespace, tmp_path: Path, text: str, debug: bool, least: str
) -> None:
    """Of the shim's and the machine's the more talkative one counts; containerd's debugging goes over both."""
    add(tmp_path, text)
    bootstrap.debug = debug
    write_bundle(tmp_path, {})
    found = boot(bootstrap, tmp_path)
    assert found.failure is None
    with capture_logs() as lines:
        for level in ("debug", "info", "warning", "error"):
            getattr(structlog.get_logger(), level)("said")
    assert lines[0]["log_level"] == least
    await found.aclose()


async def test_what_every_guest_sees_is_mounted(bootstrap: SimpleNamespace, tmp_path: Path) -> None:
    add(tmp_path, f'[runtime]\nsandbox_bind_mounts = ["{tmp_path}:rw"]\n')
    write_bundle(tmp_path, {})
    mounted: list[Any] = []
    host = Host(tmp_path / "run")
    host.share.add_sandbox_mounts = mounted.extend
    found = Boot(cast(Any, bootstrap), cast("HostState", host), 0.0)
    assert (found.failure, mounted) == (None, [f"{tmp_path}:rw"])
    await found.aclose()


@pytest.mark.parametrize(("options", "warnings"), [(b"", 0), (b"\n\x05other", 1)])
async def test_options_of_another_kind_are_named(
    bootstrap: SimpleNamespace, tmp_path: Path, options: bytes, warnings: int
) -> None:
    bootstrap.options = options
    write_bundle(tmp_path, {})
    with capture_logs() as logs:
        found = boot(bootstrap, tmp_path)
    assert sum(line["event"] == "runtime_options_ignored" for line in logs) == warnings
    assert found.failure is None
    await found.aclose()


class Machines:
    """Stands in for `booted`: what was started, and what of it has ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        monkeypatch.setattr("shim.boot.booted", self.booted)

    @asynccontextmanager
    async def booted(self, spec: VmSpec, *, listeners: object) -> AsyncIterator[Any]:
        self.started.append(spec.arch)
        try:
            yield SimpleNamespace(timings={}, pids={}, pid=len(self.started))
        finally:
            self.ended.append(spec.arch)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setattr("config.validate._QemuTopics._file", lambda self, name, path, **_: path)
    return Machines(monkeypatch)


async def test_another_machine_takes_the_place_of_the_first(
    bootstrap: SimpleNamespace, tmp_path: Path, machines: Machines
) -> None:
    write_bundle(tmp_path, {MEMORY: "192"})
    found = boot(bootstrap, tmp_path)
    assert (await found.machine()).pid == 1
    assert found.machine_type_set_by is None
    await found.replace(found.planned(found.pod, "virt"))
    assert machines.ended == ["x86_64"]
    assert (await found.machine()).pid == 2
    assert found.config.hypervisor.machine_type == "virt"
    assert found.config.hypervisor.default_memory == 192  # what the pod asks for goes along
    assert found.machine_type_set_by == "the image's architecture"
    await found.aclose()
    assert machines.ended == machines.started == ["x86_64", "aarch64"]


async def test_nothing_is_started_again_once_it_was_closed(
    bootstrap: SimpleNamespace, tmp_path: Path, machines: Machines
) -> None:
    write_bundle(tmp_path, {})
    found = boot(bootstrap, tmp_path)
    await found.machine()
    other = found.planned(found.pod, "virt")
    replacing = asyncio.create_task(found.replace(other))
    await asyncio.sleep(0)
    await found.aclose()
    with pytest.raises(GuestUnreachable, match="stopping"):
        await replacing
    assert machines.ended == machines.started == ["x86_64"]


@pytest.mark.parametrize(
    ("in_file", "annotations", "origin"),
    [
        ('machine_type = "q35"\n', {}, "configuration.toml"),
        ("", {"io.katacontainers.config.hypervisor.machine_type": "virt"}, "annotation io.kata"),
    ],
)
async def test_who_has_fixed_the_machine_is_known(
    bootstrap: SimpleNamespace,
    tmp_path: Path,
    machines: Machines,
    in_file: str,
    annotations: dict[str, str],
    origin: str,
) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text(file.read_text().replace('"default_memory"', '".*"') + in_file)
    write_bundle(tmp_path, annotations)
    found = boot(bootstrap, tmp_path)
    assert found.failure is None
    assert origin in str(found.machine_type_set_by)
    await found.aclose()


@pytest.mark.parametrize(("allowed", "aio"), [(True, "io_uring"), (False, "threads")])
def test_disks_do_without_io_uring_where_it_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, aio: str
) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    monkeypatch.setattr(hosts.Host, "has_io_uring", lambda _: allowed)
    config = Config(hypervisor=replace(Qemu(), image=str(tmp_path / "image")))
    with capture_logs() as lines:
        spec = plan(config, "s1", exported=tmp_path)
    assert spec.disk_aio == aio
    assert any(line["event"] == "io_uring_fallback" for line in lines) is not allowed

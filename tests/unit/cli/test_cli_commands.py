"""The commands as a user types them: output, exit status, and how little `--help` loads."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import shim
from cli import guest
from cli.main import app
from config import load
from config.schema import SECTIONS, Section
from config.show import encode
from guest_image import ImageError, Manifest
from shim import paths
from tests.unit.config.config_site import Site
from tests.unit.config.test_config_kata_files import COLUMNS, written

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = Manifest(
    agent_version="1.2.3",
    arch="amd64",
    kernel_release="6.1.0-test",
    python_version="3.11.2",
    protobuf_version="6.0",
    packages={"libseccomp2": "2.5"},
    kernel_modules=["vsock"],
    python_modules=10,
    parts={"Python": 20_000_000},
    files=30,
    files_sha256="ab",
    vmlinux_bytes=53_000_000,
    initrd_bytes=27_000_000,
    inputs_sha256="cd",
)


@pytest.fixture
def kata_py() -> Callable[..., tuple[int, str]]:
    """Runs the tool in this process; gives exit status and everything it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_one_version_everywhere(kata_py: Callable[..., tuple[int, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == shim.VERSION
    status, output = kata_py("--version")
    assert (status, output.split()[:2]) == (0, ["kata-py", project["version"]])


@pytest.mark.parametrize("words", [[], ["guest"], ["config"]])
def test_help_without_a_command(kata_py: Callable[..., tuple[int, str]], words: list[str]) -> None:
    status, output = kata_py(*words)
    assert status in (0, 2)  # what "no arguments" counts as differs between versions of click
    assert "Usage" in output


def test_help_of_a_build_names_the_section_that_the_files_go_into(
    kata_py: Callable[..., tuple[int, str]],
) -> None:
    status, text = kata_py("guest", "build", "--help")
    assert (status, "of the section hypervisor.qemu." in " ".join(text.split())) == (0, True)


def test_help_loads_nothing_of_ours_but_the_commands() -> None:
    code = (
        "import sys\n"
        "from cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = run.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded"
    assert not {"config", "guest_image", "hypervisor", "shim", "ttrpc", "google", "msgspec"} & set(loaded)


def test_build_reports_steps_and_result(
    kata_py: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[object] = []

    def build(folder: Path, *, progress: Callable[[str], None], **options: object) -> Manifest:
        asked.extend([folder, options])
        progress("first step")
        progress("second step")
        return MANIFEST

    monkeypatch.setattr(guest, "build_image", build)
    status, output = kata_py(
        "guest", "build", "--output", str(tmp_path), "--arch", "arm64", "--suite", "trixie"
    )
    assert status == 0
    assert asked == [tmp_path, {"arch": "arm64", "suite": "trixie", "image": None, "verity": False}]
    assert output.index("first step") < output.index("second step") < output.index("6.1.0-test")


def test_a_root_image_is_told_with_its_configuration(
    kata_py: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def build(folder: Path, **options: object) -> Manifest:
        asked.update(options)
        return replace(
            MANIFEST, rootfs_type="erofs", image_bytes=2_000_000, kernel_verity_params="root_hash=00"
        )

    monkeypatch.setattr(guest, "build_image", build)
    status, output = kata_py("guest", "build", "--output", str(tmp_path), "--image", "erofs", "--verity")
    assert status == 0
    assert (asked["image"], asked["verity"]) == ("erofs", True)
    table = tomllib.loads("".join(output.partition("[hypervisor.qemu]:\n")[2]))
    assert table == {
        "kernel": f"{tmp_path}/vmlinux",
        "image": f"{tmp_path}/rootfs.img",
        "image_initrd": f"{tmp_path}/image-initrd.img",
        "rootfs_type": "erofs",
        "kernel_verity_params": "root_hash=00",
    }


def test_failed_build_is_one_line(
    kata_py: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path, **_: object) -> Manifest:
        raise ImageError("the mirror's suite has no kernel for amd64")

    monkeypatch.setattr(guest, "build_image", build)
    status, output = kata_py("guest", "build", "--output", "/nowhere")
    assert (status, output) == (1, "kata-py: the mirror's suite has no kernel for amd64\n")


def test_info(kata_py: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, output = kata_py("guest", "info", str(tmp_path))
    assert status == 1
    assert f"kata-py guest build --output {tmp_path}" in output
    (tmp_path / guest.MANIFEST).write_text(MANIFEST.to_json())
    status, output = kata_py("guest", "info", str(tmp_path))
    assert status == 0
    assert "6.1.0-test" in output
    assert "libseccomp2 2.5" in output


@pytest.mark.parametrize(
    ("uid", "environment", "arch", "expected"),
    [
        (0, {}, "amd64", "/usr/share/kata-py"),
        (0, {}, "arm64", "/usr/share/kata-py/arm64"),
        (1000, {"XDG_DATA_HOME": "/data"}, "amd64", "/data/kata-py/guest"),
        (1000, {"XDG_DATA_HOME": "/data"}, "s390x", "/data/kata-py/guest/s390x"),
        (1000, {"HOME": "/home/me"}, "amd64", "/home/me/.local/share/kata-py/guest"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], arch: str, expected: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert guest.default_folder(arch) == Path(expected)


def write_config(folder: Path, extra: str = "") -> Path:
    for name in ("vmlinux", "initrd.img", "qemu", "virtiofsd"):
        (folder / name).touch(mode=0o755)
    path = folder / "configuration.toml"
    path.write_text(
        f'[hypervisor.qemu]\npath = "{folder}/qemu"\nkernel = "{folder}/vmlinux"\ninitrd = "{folder}/initrd.img"\n'
        f'virtio_fs_daemon = "{folder}/virtiofsd"\n{extra}'
    )
    return path


def test_good_configuration(kata_py: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10-mine.toml").write_text("[hypervisor.qemu]\ndefault_vcpus = 1\n")
    status, output = kata_py("config", "check", str(path))
    assert status == 0
    assert output.splitlines()[-2:] == [f"ok {path}", f"   with {tmp_path}/config.d/10-mine.toml"]


@pytest.mark.parametrize("column", COLUMNS)
def test_katas_own_files_are_good(
    kata_py: Callable[..., tuple[int, str]], tmp_path: Path, column: str
) -> None:
    site = Site(tmp_path)
    site.file.write_text(written(site, column))
    status, output = kata_py("config", "check", str(site.file))
    assert status == 0, output
    assert output.splitlines()[-1] == f"ok {site.file}"


def test_every_problem_of_a_configuration_is_listed(
    kata_py: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = write_config(tmp_path, 'default_memory = "much"\naccel = "warp"\n')
    status, output = kata_py("config", "check", str(path))
    assert status == 1
    assert [f"{path}: hypervisor.qemu.{key}: " in output for key in ("default_memory", "accel")] == [
        True,
        True,
    ]


def test_check_exits_with_the_verdict(kata_py: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, output = kata_py("check", "--config", str(tmp_path / "absent.toml"))
    assert status == 1
    assert f"{tmp_path}/absent.toml: does not exist" in output
    assert "Not ready" in output


def test_show_tells_value_and_origin_of_every_key(
    kata_py: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = write_config(tmp_path, "default_memory = 256\n")
    (tmp_path / "config.d").mkdir()
    drop_in = tmp_path / "config.d" / "10-mine.toml"
    drop_in.write_text("[agent.kata]\nkernel_modules = ['a', 'b']\n")
    status, output = kata_py("config", "show", str(path))
    assert status == 0
    lines = output.splitlines()
    assert f"hypervisor.qemu.default_memory = 256  # {path}" in lines
    assert f'agent.kata.kernel_modules = ["a","b"]  # {drop_in}' in lines
    assert 'hypervisor.qemu.machine_type = "q35"  # default' in lines
    nested = ("hypervisor.qemu", "agent.kata", "runtime", "factory", "hypervisor.qemu.factory")
    shown = {line.split(" = ")[0] for line in lines}
    assert {f"{header}.enable_template" for header in nested[-2:]} <= shown
    for header in nested:
        defaults = SECTIONS[header]()
        keys = [
            name for name in defaults.__struct_fields__ if not isinstance(getattr(defaults, name), Section)
        ]
        assert {f"{header}.{name}" for name in keys} <= shown


def test_show_as_json(kata_py: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, output = kata_py("config", "show", "--json", str(write_config(tmp_path)))
    assert status == 0
    assert {"key": "runtime.log_level", "value": "info", "origin": "default"} in json.loads(output)


def test_show_what_a_sandbox_uses(
    kata_py: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "RUN_ROOT", str(tmp_path))
    name = "io.katacontainers.config.hypervisor.default_memory"
    path = write_config(tmp_path, "enable_annotations = ['default_memory']\n")
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / paths.CONFIG_FILE).write_bytes(encode(load(path, env={}, annotations={name: "1Gi"})))
    path.unlink()
    status, output = kata_py("config", "show", "--sandbox", "s1")
    assert status == 0
    assert f"hypervisor.qemu.default_memory = 1024  # annotation {name}" in output.splitlines()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--sandbox", "gone"], "no sandbox gone runs here"),
        (["--sandbox", "../x"], "'../x' is not the id of a sandbox"),
        (["--sandbox", "s", "/file"], "name FILE or --sandbox, not both"),
        (["--sandbox", "torn"], "cannot be read"),
        (["/nonexistent/file"], "/nonexistent/file: does not exist"),
    ],
)
def test_nothing_to_show_is_one_line(
    kata_py: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr(paths, "RUN_ROOT", str(tmp_path))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / paths.CONFIG_FILE).write_text("[{")
    status, output = kata_py("config", "show", *words)
    assert status == 1
    assert problem in output
    assert len(output.splitlines()) == 1

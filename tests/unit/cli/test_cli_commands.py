"""The commands as a user types them: output, exit status, and how little `--help` loads."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import shim
from cli import guest
from cli.main import app
from guest_image import ImageError, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = Manifest(
    agent_version="1.2.3",
    arch="amd64",
    kernel_release="6.1.0-test",
    python_version="3.11.2",
    protobuf_version="6.0",
    packages={"crun": "1.8"},
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

    def build(folder: Path, *, arch: str, progress: Callable[[str], None], suite: str | None) -> Manifest:
        asked.extend([folder, arch, suite])
        progress("first step")
        progress("second step")
        return MANIFEST

    monkeypatch.setattr(guest, "build_image", build)
    status, output = kata_py(
        "guest", "build", "--output", str(tmp_path), "--arch", "arm64", "--suite", "trixie"
    )
    assert status == 0
    assert asked == [tmp_path, "arm64", "trixie"]
    assert output.index("first step") < output.index("second step") < output.index("6.1.0-test")


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
    assert "crun 1.8" in output


@pytest.mark.parametrize(
    ("uid", "environment", "expected"),
    [
        (0, {}, "/usr/share/kata-py"),
        (1000, {"XDG_DATA_HOME": "/data"}, "/data/kata-py/guest"),
        (1000, {"HOME": "/home/me"}, "/home/me/.local/share/kata-py/guest"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert guest.default_folder() == Path(expected)


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

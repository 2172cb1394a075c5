"""packaging/protos.py: the committed modules are fresh, and it says so when they are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "packaging/protos.py", *args]
    return subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)


def test_committed_modules_are_fresh() -> None:
    done = run(ROOT, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of only what the generator needs."""
    (tmp_path / "packaging").mkdir()
    shutil.copy(ROOT / "packaging/protos.py", tmp_path / "packaging")
    for folder in ("protos", "gen"):
        shutil.copytree(ROOT / "agent_proto" / folder, tmp_path / "agent_proto" / folder)
    return tmp_path


def test_check_names_what_differs_and_a_rewrite_repairs_it(copy: Path) -> None:
    gen = copy / "agent_proto/gen"
    changed, missing, orphan = gen / "oci_pb2.py", gen / "csi_pb2.pyi", gen / "gone_pb2.py"
    was = changed.read_text()
    changed.write_text(was + "# edited\n")
    missing.unlink()
    orphan.write_text("")

    done = run(copy, "--check")
    assert done.returncode == 1
    names = "agent_proto/gen/csi_pb2.pyi agent_proto/gen/gone_pb2.py agent_proto/gen/oci_pb2.py"
    assert done.stderr.startswith(f"stale: {names}; run ")
    assert not missing.exists()

    assert run(copy).returncode == 0
    assert run(copy, "--check").returncode == 0
    assert changed.read_text() == was
    assert not orphan.exists()


def test_a_new_field_makes_the_modules_stale(copy: Path) -> None:
    proto = copy / "agent_proto/protos/health.proto"
    proto.write_text(proto.read_text().replace("string service = 1;", "string service = 1; bool more = 2;"))
    done = run(copy, "--check")
    assert done.returncode == 1
    assert "agent_proto/gen/health_pb2.py agent_proto/gen/health_pb2.pyi" in done.stderr


def test_a_broken_proto_fails_with_the_compilers_message(copy: Path) -> None:
    (copy / "agent_proto/protos/health.proto").write_text('syntax = "proto3"; message {')
    done = run(copy, "--check")
    assert done.returncode != 0
    assert "agent_proto/protos/health.proto:1:" in done.stderr

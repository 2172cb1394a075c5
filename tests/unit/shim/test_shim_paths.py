"""Ids, places and pods."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from shim import paths

if TYPE_CHECKING:
    from pathlib import Path

CRI, CRI_ID = "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"
CRIO, CRIO_ID = "io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"
DOCKER, DOCKER_ID = "io.kubernetes.docker.type", "io.kubernetes.sandbox.id"


@pytest.mark.parametrize(
    ("annotations", "sandbox"),
    [
        ({}, "c1"),
        ({"other": "x"}, "c1"),
        ({CRI: "sandbox", CRI_ID: "c1"}, "c1"),
        ({CRI: "container", CRI_ID: "pod"}, "pod"),
        ({CRI: "container"}, "c1"),
        ({CRIO: "sandbox", CRIO_ID: "pod"}, "c1"),
        ({CRIO: "container", CRIO_ID: "pod"}, "pod"),
        ({DOCKER: "podsandbox", DOCKER_ID: "pod"}, "c1"),
        ({DOCKER: "container", DOCKER_ID: "pod"}, "pod"),
        ({CRIO: "container", CRIO_ID: "first", CRI: "container", CRI_ID: "second"}, "first"),
        ({CRI_ID: "pod"}, "c1"),
    ],
)
def test_sandbox_of(annotations: dict[str, str], sandbox: str) -> None:
    assert paths.sandbox_of(annotations, "c1") == sandbox


@pytest.mark.parametrize("good", ["a", "0", "a-b_c.d", "x" * 255, "..a", "-a"])
def test_valid_id(good: str) -> None:
    assert paths.valid_id(good)


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a b", "a\n", "a\0", "../a", "x" * 256])
def test_invalid_id(bad: str) -> None:
    assert not paths.valid_id(bad)


def test_socket_path() -> None:
    expected = hashlib.sha256(b"/run/containerd/containerd.sock/k8s.io/pod").hexdigest()
    path = paths.socket_path("/run/containerd/s", "/run/containerd/containerd.sock", "k8s.io", "pod")
    assert path == f"/run/containerd/s/{expected}"
    # 42 is the longest folder that containerd hands out, 107 what a Unix address holds.
    assert len(paths.socket_path("/" + "d" * 41, "x" * 200, "n", "i" * 255)) <= 107


def test_directories_are_apart() -> None:
    assert paths.run_dir("a") == "/run/kata-py/a"
    assert paths.shared_dir("a") == "/run/kata-containers/shared/sandboxes/a"


def test_make_dir_while_others_remove_the_shared_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tmp_path / "a" / "b" / "own"
    make, removed = os.mkdir, []

    def interfered(path: str, mode: int = 0o777) -> None:
        make(path, mode)
        if path not in removed and path != str(wanted):
            removed.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", interfered)
    paths.make_dir(str(wanted))
    assert removed == [str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert wanted.stat().st_mode & 0o777 == 0o700


def test_make_dir_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        paths.make_dir(str(tmp_path))

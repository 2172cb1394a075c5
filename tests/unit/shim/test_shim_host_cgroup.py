"""The pod's control group on the host: its name, and that the sandbox moves in and out, in hierarchies of folders."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shim.host_cgroup import HostCgroup, empty, members, path_of, remove


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("", ""),
        ("/", ""),
        ("/default/c1", "/default/c1"),
        ("default//c1/", "/default/c1"),
        ("/kubepods/burstable/pod1/abc", "/kubepods/burstable/pod1/abc"),
        (
            "kubepods-burstable-pod1.slice:cri-containerd:abc",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
        ),
        ("system.slice:docker:abc", "/system.slice/docker-abc.scope"),
        ("-.slice:p:n", "/p-n.scope"),
        (":p:n.slice", "/n.slice"),
        ("/a:b:c", "/a:b:c"),
    ],
)
def test_path(named: str, path: str) -> None:
    assert path_of(named) == path


@pytest.mark.parametrize("named", ["/a/../../b", "..", "a.slice:..:/../c"])
def test_a_path_that_leads_out(named: str) -> None:
    with pytest.raises(ValueError, match="leads out of the control groups"):
        path_of(named)


class Tree:
    """Control groups as plain folders: the kernel would make their files."""

    def __init__(self, root: Path, *hierarchies: str) -> None:
        self.root = root
        self.hierarchies = [root / name for name in hierarchies] or [root]
        for folder in self.hierarchies:
            self.group(folder)
        if not hierarchies:
            (root / "cgroup.controllers").write_text("cpu memory\n")
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)

    def group(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text("")

    def say_membership(self, text: str) -> None:
        (self.proc / "self" / "cgroup").write_text(text)


def test_on_a_host_with_version_2(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.say_membership("0::/system.slice/containerd.service\n")
    tree.group(tmp_path / "system.slice/containerd.service")
    (tmp_path / "pods").mkdir()
    group = HostCgroup("/pods/web", str(tmp_path))
    assert group.folders == [f"{tmp_path}/pods/web"]
    group.create()
    tree.group(tmp_path / "pods/web")
    group.join([42], str(tree.proc))
    assert (tmp_path / "pods/web/cgroup.procs").read_text() == "42" + str(os.getpid())[
        2:
    ]  # one after the other
    (tmp_path / "pods/web/cgroup.procs").unlink()  # the kernel's do not keep a group from going
    group.leave()
    assert (tmp_path / "system.slice/containerd.service/cgroup.procs").read_text() == str(os.getpid())
    assert not (tmp_path / "pods/web").exists()
    assert (tmp_path / "pods").exists()  # the kubelet's
    group.leave()


def test_on_a_host_with_version_1(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "cpu,cpuacct", "cpuset", "memory", "devices")
    for name in ("cpu", "cpuacct"):
        (tmp_path / name).symlink_to("cpu,cpuacct")
    tree.say_membership("3:cpu,cpuacct:/a\n2:cpuset:/\n1:memory:/a\n4:devices:/a\n0::/x\n")
    group = HostCgroup("/pods/web", str(tmp_path))
    assert group.folders == [f"{tmp_path}/{name}/pods/web" for name in ("cpu,cpuacct", "cpuset", "memory")]
    group.create()
    for folder in group.folders:
        tree.group(Path(folder))
    for name in ("cpu,cpuacct", "memory"):
        tree.group(tmp_path / name / "a")
    group.join([], str(tree.proc))
    for folder in group.folders:
        assert (Path(folder) / "cgroup.procs").read_text() == str(os.getpid())
        (Path(folder) / "cgroup.procs").unlink()
    group.leave()
    for folder in ("cpu,cpuacct/a", "cpuset", "memory/a"):
        assert (tmp_path / folder / "cgroup.procs").read_text() == str(os.getpid())
    assert not any(os.path.exists(folder) for folder in group.folders)


def test_a_group_that_was_there_stays(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.say_membership("0::/\n")
    tree.group(tmp_path / "mine")
    group = HostCgroup("/mine", str(tmp_path))
    assert group.folders == []
    group.create()
    group.join([], str(tree.proc))
    group.leave()
    assert (tmp_path / "mine").exists()


def test_a_new_group_of_cpusets_has_its_parents(tmp_path: Path) -> None:
    """The kernel's folders come with these files; here a folder that is there already stands for that."""
    Tree(tmp_path, "cpuset")
    for name, text in (("cpuset.cpus", "0-3\n"), ("cpuset.mems", "0\n")):
        (tmp_path / "cpuset" / name).write_text(text)
    from unittest.mock import patch

    made = os.mkdir

    def mkdir(folder: str, mode: int = 0o777) -> None:
        made(folder, mode)
        (Path(folder) / "cgroup.procs").write_text("")
        for name in ("cpuset.cpus", "cpuset.mems"):
            (Path(folder) / name).write_text("")

    with patch("os.mkdir", mkdir):
        HostCgroup("/a/b", str(tmp_path)).create()
    assert (tmp_path / "cpuset/a/b/cpuset.cpus").read_text() == "0-3\n"
    assert (tmp_path / "cpuset/a/cpuset.mems").read_text() == "0\n"


def test_what_is_gone_already_is_fine(tmp_path: Path) -> None:
    assert members([str(tmp_path / "none")]) == set()
    empty([str(tmp_path / "none")], 1)
    remove([str(tmp_path / "none")])


def test_what_is_still_in_a_group_is_ended_before(tmp_path: Path) -> None:
    """A plain file does not forget the process as the kernel does: one look is all that there is time for."""
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        (tmp_path / "cgroup.procs").write_text(f"{sleeper.pid}\n{sleeper.pid}\n")
        empty([str(tmp_path)], 0.2)
        assert sleeper.wait(10) == -9
    finally:
        sleeper.kill()
        sleeper.wait()

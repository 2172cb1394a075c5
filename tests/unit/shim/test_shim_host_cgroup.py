"""A sandbox's control groups on the host: their names, and who moves in and out, in hierarchies that are folders."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim import host_cgroup
from shim.host_cgroup import HostCgroup, Limits, empty, members, overhead_path, path_of, remove

if TYPE_CHECKING:
    from collections.abc import Iterator


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


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("", "/kata_overhead/s1"),
        ("/kubepods/pod1/s1", "/kata_overhead/s1"),
        ("kubepods-pod1.slice:cri-containerd:s1", "/kata-overhead.slice/kata-py-s1.scope"),
    ],
)
def test_path_of_the_overhead(named: str, path: str) -> None:
    assert overhead_path(named, "s1") == path


V1_FILES = {
    "cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
    "cpuset": {"cpuset.cpus": "", "cpuset.mems": ""},
}
V2_FILES = {"cgroup.controllers": "", "cgroup.subtree_control": "", "memory.max": "max"}
QEMU, VIRTIOFSD = 4194301, 4194302
VCPUS = [4194303, 4194304]


class Kernel:
    """Control groups as folders with the files that the kernel would make, of which each has what was written last; and
    where a process is, is written once in each hierarchy. Real ones are in the integration tests."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *hierarchies: str) -> None:
        self.root = root
        self.unified = not hierarchies
        self.refused = ""
        self.os = SimpleNamespace(**vars(os) | {"mkdir": self.mkdir, "rmdir": self.rmdir})
        monkeypatch.setattr(host_cgroup, "os", self.os)
        monkeypatch.setattr(host_cgroup, "_write", self.write)
        for folder in [root / name for name in hierarchies] or [root]:
            folder.mkdir(exist_ok=True)
            self._fill(folder)
        if not self.unified:
            (root / "cpuset" / "cpuset.cpus").write_text("0-3\n")
            (root / "cpuset" / "cpuset.mems").write_text("0\n")
        self.proc = root.parent / "proc"
        (self.proc / "self").mkdir(parents=True)

    def mkdir(self, folder: str) -> None:
        os.mkdir(folder)
        self._fill(Path(folder))

    def _fill(self, folder: Path) -> None:
        (folder / "cgroup.procs").write_text("")
        hierarchy = folder.relative_to(self.root).parts[:1]
        files = V2_FILES if self.unified else {"tasks": ""}
        for name in "".join(hierarchy).split(",") if not self.unified else ():
            files = files | V1_FILES.get(name, {})
        for name, text in files.items():
            (folder / name).write_text(text)
        if self.unified and folder != self.root:
            for name in ("cpu.max", "cpuset.cpus"):
                (folder / name).write_text("")

    def rmdir(self, folder: str) -> None:
        entries = list(Path(folder).iterdir())
        if any(entry.is_dir() for entry in entries) or self.inside(Path(folder)):
            raise OSError(16, "Device or resource busy", folder)
        for entry in entries:
            entry.unlink()
        os.rmdir(folder)

    def write(self, name: str, text: str) -> None:
        if self.refused and name.endswith(self.refused):
            raise OSError(22, "Invalid argument", name)
        path = Path(name)
        if path.name not in ("cgroup.procs", "tasks"):
            with path.open("r+" if path.name != "cgroup.subtree_control" else "a") as file:
                file.write(text)
                file.truncate()
            return
        hierarchy = self.root if self.unified else self.root / path.relative_to(self.root).parts[0]
        for other in hierarchy.rglob(path.name):
            kept = [pid for pid in other.read_text().split() if pid != text]
            other.write_text("".join(f"{pid}\n" for pid in kept))
        with path.open("a") as file:
            file.write(f"{text}\n")

    def inside(self, folder: Path, file: str = "cgroup.procs") -> list[int]:
        return [int(word) for word in (folder / file).read_text().split()]

    def made(self, *paths: str) -> None:
        for path in paths:
            folder = self.root
            for name in path.split("/"):
                folder /= name
                if not folder.is_dir():
                    self.mkdir(str(folder))

    def say_membership(self, text: str) -> None:
        (self.proc / "self" / "cgroup").write_text(text)

    def tree(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_dir())


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A host with version 2, containerd as systemd's service, and a pod that a kubelet has made."""
    (tmp_path / "cgroup").mkdir()
    kernel = Kernel(tmp_path / "cgroup", monkeypatch)
    kernel.made("system.slice/containerd.service", "pods/pod1")
    kernel.say_membership("0::/system.slice/containerd.service\n")
    return kernel


@pytest.fixture
def v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The same with version 1, where two controllers share a hierarchy."""
    (tmp_path / "cgroup").mkdir()
    names = ("cpu,cpuacct", "cpuset", "memory", "devices")
    kernel = Kernel(tmp_path / "cgroup", monkeypatch, *names)
    for name in ("cpu", "cpuacct"):
        (kernel.root / name).symlink_to("cpu,cpuacct")
    kernel.made(*(f"{name}/a" for name in names), *(f"{name}/pods/pod1" for name in names))
    kernel.say_membership("3:cpu,cpuacct:/a\n2:cpuset:/\n1:memory:/a\n4:devices:/a\n0::/x\n")
    return kernel


ME = os.getpid()


def test_the_pods_group_alone_on_version_2(v2: Kernel) -> None:
    before = v2.tree()
    group = HostCgroup("/pods/pod1/s", root=str(v2.root))
    assert group.folders == [f"{v2.root}/pods/pod1/s"]
    group.create_and_join([QEMU, VIRTIOFSD], str(v2.proc))
    assert v2.inside(v2.root / "pods/pod1/s") == [ME, QEMU, VIRTIOFSD]
    for pid in (QEMU, VIRTIOFSD):
        v2.write(f"{v2.root}/cgroup.procs", str(pid))  # they have ended
    group.leave()
    assert v2.inside(v2.root / "system.slice/containerd.service") == [ME]
    assert v2.tree() == before
    group.leave()


def test_the_pods_group_alone_on_version_1(v1: Kernel) -> None:
    before = v1.tree()
    group = HostCgroup("/pods/pod1/s", root=str(v1.root))
    assert group.folders == [f"{v1.root}/{name}/pods/pod1/s" for name in ("cpu,cpuacct", "cpuset", "memory")]
    group.create_and_join([], str(v1.proc))
    assert (v1.root / "cpuset/pods/pod1/s/cpuset.cpus").read_text() == "0-3\n"
    for folder in group.folders:
        assert v1.inside(Path(folder)) == [ME]
    group.leave()
    for folder in ("cpu,cpuacct/a", "cpuset", "memory/a"):
        assert v1.inside(v1.root / folder) == [ME]
    assert v1.tree() == before


def test_processors_and_overhead_on_version_1(v1: Kernel) -> None:
    """Threads in what counts by thread; a process is in one group of a hierarchy all the same."""
    before = v1.tree()
    group = HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v1.root))
    group.create_and_join([QEMU, VIRTIOFSD], str(v1.proc))
    for name in ("cpu,cpuacct", "cpuset", "memory"):
        assert v1.inside(v1.root / name / "kata_overhead/s") == [ME, QEMU, VIRTIOFSD]
    assert not (v1.root / "memory/pods/pod1/s").exists()
    assert group.memory_limit() is None
    group.hold(QEMU, VCPUS[:1], Limits())
    group.hold(QEMU, VCPUS, Limits(150_000, 0, frozenset({3, 1})))
    for name in ("cpu,cpuacct", "cpuset"):
        assert v1.inside(v1.root / name / "pods/pod1/s", "tasks") == VCPUS
    assert (v1.root / "cpuset/pods/pod1/s/cpuset.cpus").read_text() == "1,3"
    assert (v1.root / "cpu/pods/pod1/s/cpu.cfs_quota_us").read_text() == "150000"
    assert (v1.root / "cpu/pods/pod1/s/cpu.cfs_period_us").read_text() == "100000"
    group.hold(QEMU, VCPUS, Limits())
    assert (v1.root / "cpuset/pods/pod1/s/cpuset.cpus").read_text() == "0-3\n"
    assert (v1.root / "cpu/pods/pod1/s/cpu.cfs_quota_us").read_text() == "-1"
    leave_with_the_machine(v1, group)
    assert v1.tree() == before


def test_processors_and_overhead_on_version_2(v2: Kernel) -> None:
    """QEMU as a whole is the pod's: its threads cannot be apart from its memory."""
    before = v2.tree()
    group = HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v2.root))
    group.create_and_join([QEMU, VIRTIOFSD], str(v2.proc))
    assert v2.inside(v2.root / "kata_overhead/s") == [ME, QEMU, VIRTIOFSD]
    group.hold(QEMU, VCPUS, Limits(50_000, 200_000, frozenset({0})))
    assert v2.inside(v2.root / "pods/pod1/s") == [QEMU]
    assert v2.inside(v2.root / "kata_overhead/s") == [ME, VIRTIOFSD]
    assert (v2.root / "pods/pod1/s/cpu.max").read_text() == "50000 200000"
    assert (v2.root / "pods/pod1/s/cpuset.cpus").read_text() == "0"
    for folder in (v2.root, v2.root / "kata_overhead", v2.root / "pods/pod1"):
        assert "+cpu+cpuset+io+memory+pids" in (folder / "cgroup.subtree_control").read_text()
    group.hold(QEMU, VCPUS, Limits())
    assert (v2.root / "pods/pod1/s/cpu.max").read_text() == "max 100000"
    assert (v2.root / "pods/pod1/s/cpuset.cpus").read_text() == "\n"
    leave_with_the_machine(v2, group)
    assert v2.tree() == before


def leave_with_the_machine(kernel: Kernel, group: HostCgroup) -> None:
    """QEMU and virtiofsd have ended before; a process that nobody ends is moved out of the way."""
    for path in kernel.root.rglob("tasks"):
        path.write_text("")
    for path in kernel.root.rglob("cgroup.procs"):
        path.write_text("".join(f"{pid}\n" for pid in kernel.inside(path.parent) if pid in (ME, VIRTIOFSD)))
    group.leave()
    assert VIRTIOFSD in kernel.inside(
        kernel.root / ("system.slice/containerd.service" if kernel.unified else "memory/a")
    )
    group.create_and_join([QEMU], str(kernel.proc))
    group.hold(QEMU, VCPUS, Limits(1))
    assert not any(map(os.path.isdir, group.folders))


def test_a_sandbox_without_a_pods_group(v1: Kernel) -> None:
    group = HostCgroup("", "/kata_overhead/s", str(v1.root))
    group.create_and_join([QEMU], str(v1.proc))
    group.hold(QEMU, VCPUS, Limits(1))
    assert v1.inside(v1.root / "memory/kata_overhead/s") == [ME, QEMU]
    assert v1.inside(v1.root / "cpu/tasks".removesuffix("/tasks"), "tasks") == []
    leave_with_the_machine_moved(v1, group)


def leave_with_the_machine_moved(kernel: Kernel, group: HostCgroup) -> None:
    group.leave()
    assert not (kernel.root / "memory/kata_overhead").exists()


def test_the_last_sandbox_takes_the_folder_of_all_with_it(v2: Kernel) -> None:
    one, two = (HostCgroup(f"/pods/{name}", f"/kata_overhead/{name}", str(v2.root)) for name in "ab")
    for group in (one, two):
        group.create_and_join([], str(v2.proc))
    one.leave()
    assert (v2.root / "kata_overhead/b").is_dir()
    two.leave()
    assert not (v2.root / "kata_overhead").exists()


def test_another_sandbox_removes_the_folder_of_all_meanwhile(
    v2: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v2.root))
    make, times = v2.mkdir, list[int]()

    def mkdir(folder: str) -> None:
        if folder.endswith("/kata_overhead/s") and not times:
            times.append(1)
            v2.rmdir(f"{v2.root}/kata_overhead")
        make(folder)

    monkeypatch.setattr(v2.os, "mkdir", mkdir)
    group.create_and_join([], str(v2.proc))
    assert (v2.root / "kata_overhead/s").is_dir()
    assert times


def test_the_group_that_it_came_from_is_gone(v2: Kernel) -> None:
    group = HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v2.root))
    group.create_and_join([], str(v2.proc))
    v2.rmdir(f"{v2.root}/system.slice/containerd.service")
    group.leave()
    assert v2.inside(v2.root) == [ME]
    assert not (v2.root / "kata_overhead").exists()


def test_a_group_that_was_there_stays_and_keeps_its_limits(v2: Kernel) -> None:
    v2.made("mine")
    group = HostCgroup("/mine", "/kata_overhead/s", str(v2.root))
    group.create_and_join([], str(v2.proc))
    group.hold(QEMU, [], Limits(50_000))
    assert (v2.root / "mine/cpu.max").read_text() == ""
    v2.write(f"{v2.root}/cgroup.procs", str(QEMU))
    group.leave()
    assert (v2.root / "mine").is_dir()


@pytest.mark.parametrize(
    ("limits", "least"), [({}, None), ({"pods": "4096"}, 4096), ({"pods": "4096", "pods/pod1": "99"}, 99)]
)
def test_the_memory_limit_is_the_least_above(v2: Kernel, limits: dict[str, str], least: int | None) -> None:
    for path, text in limits.items():
        (v2.root / path / "memory.max").write_text(f"{text}\n")
    assert HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v2.root)).memory_limit() == least


def test_limits_that_are_refused_are_told_of(v1: Kernel) -> None:
    group = HostCgroup("/pods/pod1/s", "/kata_overhead/s", str(v1.root))
    group.create_and_join([], str(v1.proc))
    v1.refused = "cpuset.cpus"
    with pytest.raises(OSError, match=r"Invalid argument: .*/cpuset/pods/pod1/s/cpuset\.cpus"):
        group.hold(QEMU, VCPUS, Limits(0, 0, frozenset({99})))


def test_what_is_gone_already_is_fine(v1: Kernel) -> None:
    assert members([str(v1.root / "none")]) == set()
    empty([str(v1.root / "none")], 1, str(v1.proc), str(v1.root))
    remove([str(v1.root / "none")])


def test_what_is_still_in_a_group_moves_to_who_cleans_up(v1: Kernel) -> None:
    v1.made("memory/kata_overhead/s", "cpu,cpuacct/kata_overhead/s")
    folders = [f"{v1.root}/{name}/kata_overhead/s" for name in ("memory", "cpu,cpuacct")]
    for folder in folders:
        v1.write(f"{folder}/cgroup.procs", str(QEMU))
    empty(folders, 10, str(v1.proc), str(v1.root))
    assert v1.inside(v1.root / "memory/a") == v1.inside(v1.root / "cpu/a") == [QEMU]
    remove(folders)
    assert not any(map(os.path.isdir, folders))


@pytest.fixture
def ending() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process:
        yield process


def test_what_is_on_its_way_out_is_waited_for(
    v1: Kernel, ending: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel moves no process that is ending, and says nothing of it."""
    v1.made("memory/kata_overhead/s")
    folder = f"{v1.root}/memory/kata_overhead/s"
    Path(folder, "cgroup.procs").write_text(f"{ending.pid}\n")
    wait_for: Any = select.select
    waited: list[Any] = []

    def wait(*arguments: object) -> object:
        waited.append(wait_for(*arguments))
        Path(folder, "cgroup.procs").write_text("")
        return waited

    monkeypatch.setattr(host_cgroup, "_write", lambda name, text: None)
    monkeypatch.setattr(host_cgroup, "select", SimpleNamespace(select=wait))
    empty([folder], 10, str(v1.proc), str(v1.root))
    assert waited[0][0]  # it had ended, the time was not up

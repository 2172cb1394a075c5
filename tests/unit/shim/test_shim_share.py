"""The shared directory: what is mounted where, and that taking it down never reaches what was mounted."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import cleanup, mounts, paths
from shim.api.gen.types_pb2 import Mount
from shim.errors import InvalidRequest
from shim.share import GUEST_PASSTHROUGH, SharedDir
from tests.support.host import mounts_below
from tests.support.namespaces import in_mount_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[Callable[[SharedDir], None]], None]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "SHARED_ROOT", str(tmp_path / "sandboxes"))
    return tmp_path


@pytest.fixture
def run(root: Path) -> Run:
    """Runs a function with a created share in a mount namespace; nothing may be left after `remove`."""

    def run(work: Callable[[SharedDir], None]) -> None:
        def inside() -> None:
            share = SharedDir("s1")
            share.create()
            work(share)
            share.remove()
            share.remove()
            assert mounts_below(root) == []
            assert not (root / "sandboxes" / "s1").exists()

        in_mount_namespace(inside)

    return run


def tree(folder: Path, *names: str) -> Path:
    """A folder with files whose content is their name."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def on_host(share: SharedDir, guest_path: str) -> Path:
    """What virtiofsd shows the guest at a path."""
    return share.exported / Path(guest_path).relative_to(Path(GUEST_PASSTHROUGH).parent)


def test_rootfs_from_a_directory(run: Run, root: Path) -> None:
    rootfs = tree(root / "rootfs", "init")

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            path = share.add_rootfs("c1", [], rootfs, undo)
            assert path == f"{GUEST_PASSTHROUGH}/c1/rootfs"
            assert (on_host(share, path) / "init").read_text() == "init"
            (share.exported.parent / "rw/passthrough/c1/rootfs/new").write_text("written")
            with pytest.raises(OSError, match="Read-only"):
                (share.exported / "intruder").touch()
        assert os.listdir(share.exported / "passthrough") == []

    run(work)
    assert (rootfs / "new").read_text() == "written"


def test_rootfs_from_mounts(run: Run, root: Path) -> None:
    lower, upper = tree(root / "lower", "a"), tree(root / "upper")
    tree(root / "work")
    options = [f"lowerdir={lower}", f"upperdir={upper}", f"workdir={root}/work"]

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            mount = Mount(type="overlay", source="overlay", options=options)
            path = share.add_rootfs("c1", [mount], root / "unused", undo)
            assert (on_host(share, path) / "a").read_text() == "a"
        assert os.listdir(share.exported / "passthrough") == []

    run(work)


def test_rootfs_of_several_mounts(run: Run, root: Path) -> None:
    base, part = tree(root / "base", "a"), tree(root / "part", "b")
    (base / "sub").mkdir()

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            wanted = [
                Mount(type="bind", source=str(base), options=["rbind"]),
                Mount(type="bind", source=str(part), target="/sub", options=["bind", "ro"]),
            ]
            path = on_host(share, share.add_rootfs("c1", wanted, root / "unused", undo))
            assert (path / "sub" / "b").read_text() == "b"
            with pytest.raises(OSError, match="Read-only"):
                (share.exported.parent / "rw/passthrough/c1/rootfs/sub/c").touch()
        assert os.listdir(share.exported / "passthrough") == []

    run(work)
    assert sorted(os.listdir(part)) == ["b"]


def test_rootfs_of_mounts_on_top_of_each_other(run: Run, root: Path) -> None:
    below, above = tree(root / "below", "a"), tree(root / "above", "b")

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            wanted = [Mount(type="bind", source=str(source), options=["rbind"]) for source in (below, above)]
            path = on_host(share, share.add_rootfs("c1", wanted, root / "unused", undo))
            assert os.listdir(path) == ["b"]
        assert os.listdir(share.exported / "passthrough") == []

    run(work)
    assert (os.listdir(below), os.listdir(above)) == (["a"], ["b"])


@pytest.mark.parametrize("target", ["..", "../..", "a/../..", "../../../../etc"])
def test_rootfs_mount_outside(run: Run, root: Path, target: str) -> None:
    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            mount = Mount(type="bind", source=str(root), target=target, options=["bind"])
            with pytest.raises(InvalidRequest, match="outside"):
                share.add_rootfs("c1", [mount], root, undo)

    run(work)


@pytest.mark.parametrize("layers", [3, 120, 600])
def test_overlay_of_many_layers(run: Run, root: Path, layers: int) -> None:
    """An image of 128 layers has longer options than mount(2) takes, if they are written as containerd has them."""
    folder = root / "var-lib-containerd" / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
    for number in range(layers):
        tree(folder / str(1000 + number) / "fs", f"file{number}")
    lower = ":".join(str(folder / str(1000 + number) / "fs") for number in range(layers))
    upper, work_dir = tree(folder / "2000" / "fs"), tree(folder / "2000" / "work")
    options = [f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work_dir}", "index=off"]
    before = os.getcwd()

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            mount = Mount(type="overlay", source="overlay", options=options)
            if layers == 600:  # relative paths do not fit either
                with pytest.raises(OSError, match="600 layers"):
                    share.add_rootfs("c1", [mount], root, undo)
                return
            path = on_host(share, share.add_rootfs("c1", [mount], root, undo))
            assert len(os.listdir(path)) == layers
            (share.exported.parent / "rw/passthrough/c1/rootfs/new").write_text("x")
        assert (upper / "new").read_text() == "x"
        assert os.getcwd() == before

    run(work)


def test_volume_directory_and_file(run: Run, root: Path) -> None:
    data, file = tree(root / "data", "x"), tree(root / "files", "hosts") / "hosts"

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            directory = share.add_volume(str(data), readonly=False, undo=undo)
            single = share.add_volume(str(file), readonly=True, undo=undo)
            assert directory.startswith(f"{GUEST_PASSTHROUGH}/sandbox-")
            assert directory.endswith("-data")
            assert (on_host(share, directory) / "x").read_text() == "x"
            assert on_host(share, single).read_text() == "hosts"
            with pytest.raises(OSError, match="Read-only"):
                (share.exported.parent / "rw/passthrough" / Path(single).name).write_text("no")
        assert os.listdir(share.exported / "passthrough") == []

    run(work)


def test_volume_with_mounts_inside(run: Run, root: Path) -> None:
    data = tree(root / "data")
    (data / "tmp").mkdir()

    def work(share: SharedDir) -> None:
        mounts.mount("tmpfs", str(data / "tmp"), "tmpfs")
        (data / "tmp" / "inner").write_text("inner")
        with ExitStack() as undo:
            path = on_host(share, share.add_volume(str(data), readonly=False, undo=undo))
            assert (path / "tmp" / "inner").read_text() == "inner"
        mounts.detach(str(data / "tmp"))

    run(work)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "däta", "tab\there", "back\\slash", "line\nbreak", "日本"]
)
def test_removal_never_reaches_what_is_mounted(run: Run, root: Path, name: str) -> None:
    """The names of mount points come from the kernel in a notation of its own."""
    data = tree(root / name, "precious")

    def work(share: SharedDir) -> None:
        share.add_volume(str(data), readonly=False, undo=ExitStack())  # never undone: as after a crash
        share.add_rootfs("c1", [], data, ExitStack())

    run(work)
    assert (data / "precious").read_text() == "precious"


def test_missing_sources(run: Run, root: Path) -> None:
    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            with pytest.raises(InvalidRequest, match="/nothing does not exist"):
                share.add_rootfs("c1", [], root / "nothing", undo)
            with pytest.raises(InvalidRequest, match="/nothing into the container"):
                share.add_volume(str(root / "nothing"), readonly=False, undo=undo)

    run(work)


def test_refused_mount_leaves_nothing(run: Run, root: Path) -> None:
    def work(share: SharedDir) -> None:
        with ExitStack() as undo, pytest.raises(OSError, match="cannot mount nosuchfs"):
            share.add_rootfs("c1", [Mount(type="nosuchfs", source="x")], root, undo)
        assert os.listdir(share.exported / "passthrough") == []

    run(work)


def test_tree_with_a_mount_is_not_removed(root: Path) -> None:
    data = tree(root / "data", "precious")

    def inside() -> None:
        target = root / "doomed" / "inner"
        target.mkdir(parents=True)
        mounts.bind(str(data), str(target))
        with pytest.raises(OSError, match="mounted"):
            cleanup.remove_tree(str(root / "doomed"))

    in_mount_namespace(inside)
    assert (data / "precious").read_text() == "precious"

"""The shared directory: what is mounted where, and that taking it down never reaches what was mounted."""

from __future__ import annotations

import os
import subprocess
import threading
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


def volume(share: SharedDir, source: Path, options: list[str], undo: ExitStack) -> str:
    """The guest's path of a volume."""
    return share.add_volume(str(source), options, undo)[0]


def test_what_every_guest_sees(run: Run, root: Path) -> None:
    folder = tree(root / "certs", "ca")
    (root / "file").write_text("old")

    def work(share: SharedDir) -> None:
        share.add_sandbox_mounts([f"{folder}:ro", f"{root / 'file'}:rw"])
        seen = share.exported / "passthrough" / "sandbox-mounts"
        assert (seen / "certs" / "ca").read_text() == "ca"
        # As a daemon with write access would: through the view that is not read-only as a whole.
        there = share.exported.parent / "rw/passthrough/sandbox-mounts"
        (there / "file").write_text("new")
        with pytest.raises(OSError, match="Read-only"):
            (there / "certs" / "ca").write_text("changed")

    run(work)
    assert (root / "file").read_text() == "new"
    assert (folder / "ca").read_text() == "ca"


def test_what_has_gone_meanwhile_is_an_error(run: Run, root: Path) -> None:
    def work(share: SharedDir) -> None:
        with pytest.raises(FileNotFoundError):
            share.add_sandbox_mounts([f"{root / 'gone'}:ro"])

    run(work)


@pytest.mark.parametrize("option", ["io.katacontainers.volume=eA==", "io.katacontainers.fs-opt.is-layer"])
def test_images_for_the_guest_to_mount_are_refused_by_name(run: Run, root: Path, option: str) -> None:
    def work(share: SharedDir) -> None:
        mount = Mount(type="overlay", source="overlay", options=["ro", option])
        with (
            ExitStack() as undo,
            pytest.raises(InvalidRequest, match=f"option {option.split('=')[0]}, .*snapshotter"),
        ):
            share.add_rootfs("c1", [mount], root, undo)

    run(work)


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


@pytest.mark.parametrize("target", ["..", "a/../..", "/../../{outside}", "link", "/up/{outside}", "a/back"])
def test_rootfs_mount_stays_inside(run: Run, root: Path, target: str) -> None:
    """A target is a path in the root file system, also where that has symlinks which mean the host's paths here."""
    outside, part = tree(root / "outside", "precious"), tree(root / "part", "b")
    base = tree(root / "base")
    (base / "a").mkdir()
    (base / str(outside)[1:]).mkdir(parents=True)
    (base / "link").symlink_to(outside)
    (base / "up").symlink_to("../" * 20)
    (base / "a" / "back").symlink_to("../" * 20 + str(outside)[1:])

    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            wanted = [
                Mount(type="bind", source=str(base), options=["rbind"]),
                Mount(
                    type="bind",
                    source=str(part),
                    target=target.format(outside=str(outside)[1:]),
                    options=["bind"],
                ),
            ]
            path = on_host(share, share.add_rootfs("c1", wanted, root / "unused", undo))
            assert os.listdir(outside) == ["precious"]
            inside = path if target in ("..", "a/../..") else path / str(outside)[1:]
            assert os.listdir(inside) == ["b"]
        assert os.listdir(share.exported / "passthrough") == []

    run(work)


def test_rootfs_mount_on_nothing(run: Run, root: Path) -> None:
    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            mount = Mount(type="bind", source=str(root), target="/not/there", options=["bind"])
            with pytest.raises(OSError, match="cannot find /not/there"):
                share.add_rootfs("c1", [mount], root, undo)
        assert os.listdir(share.exported / "passthrough") == []

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
            directory = volume(share, data, ["rbind"], undo)
            single = volume(share, file, ["rbind", "ro"], undo)
            assert directory.startswith(f"{GUEST_PASSTHROUGH}/sandbox-")
            assert directory.endswith("-data")
            assert (on_host(share, directory) / "x").read_text() == "x"
            assert on_host(share, single).read_text() == "hosts"
            for side in ("rw", "ro"):
                with pytest.raises(OSError, match="Read-only"):
                    (share.exported.parent / side / "passthrough" / Path(single).name).write_text("no")
                (share.exported.parent / side / "passthrough" / Path(directory).name / side).touch()
        assert os.listdir(share.exported / "passthrough") == []

    run(work)
    assert sorted(os.listdir(data)) == ["ro", "rw", "x"]


@pytest.mark.parametrize("option", ["ro", "rro"])
def test_guest_cannot_write_below_a_read_only_volume(run: Run, root: Path, option: str) -> None:
    """Where the guest comes to the volume, and in file systems inside of it too."""
    data = tree(root / "data", "x")
    (data / "tmp").mkdir()

    def work(share: SharedDir) -> None:
        mounts.mount("tmpfs", str(data / "tmp"), "tmpfs")
        with ExitStack() as undo:
            path = on_host(share, volume(share, data, ["rbind", option], undo))
            for name in ("x", "new", "tmp/new"):
                with pytest.raises(OSError, match="Read-only"):
                    (path / name).write_text("no")
        (data / "tmp" / "new").write_text("the host may")
        mounts.detach(str(data / "tmp"))

    run(work)
    assert (data / "x").read_text() == "x"


@pytest.mark.parametrize(
    ("options", "follows"), [(["rbind", "rslave"], True), (["rbind", "rprivate"], False), (["rbind"], False)]
)
def test_later_mounts_of_the_host(run: Run, root: Path, options: list[str], follows: bool) -> None:
    """They show in the volumes that ask for it; in all others, what is in use there never keeps the host's mounts."""
    data = tree(root / "data")
    for name in ("before", "later"):
        (data / name).mkdir()

    def work(share: SharedDir) -> None:
        mounts.bind(str(data), str(data))
        mounts.mount("", str(data), "", mounts.MS_SHARED)
        mounts.mount("tmpfs", str(data / "before"), "tmpfs")
        with ExitStack() as undo:
            path = on_host(share, volume(share, data, options, undo))
            assert os.path.ismount(path / "before")
            mounts.mount("tmpfs", str(data / "later"), "tmpfs")
            assert os.path.ismount(path / "later") is follows
            in_use = os.open(path / "before", os.O_RDONLY)
            unmounted = subprocess.run(["umount", data / "before"], check=False, stderr=subprocess.DEVNULL)
            assert (unmounted.returncode == 0) is not follows
            os.close(in_use)
        # What leaves the volume does not leave the host.
        assert os.path.ismount(data / "later")
        assert os.path.ismount(data / "before") is follows
        for name in ("before", "later", "."):
            mounts.detach(str(data / name))

    run(work)


def test_volume_with_mounts_inside(run: Run, root: Path) -> None:
    data = tree(root / "data")
    (data / "tmp").mkdir()

    def work(share: SharedDir) -> None:
        mounts.mount("tmpfs", str(data / "tmp"), "tmpfs")
        (data / "tmp" / "inner").write_text("inner")
        with ExitStack() as undo:
            path = on_host(share, volume(share, data, ["rbind"], undo))
            assert (path / "tmp" / "inner").read_text() == "inner"
        mounts.detach(str(data / "tmp"))

    run(work)


@pytest.mark.parametrize("options", [(), ("nodev",), ("nosuid", "nodev", "noexec")])
def test_volumes_keep_the_restrictions_of_the_hosts_mount(
    run: Run, root: Path, options: tuple[str, ...]
) -> None:
    def work(share: SharedDir) -> None:
        (root / "data").mkdir()
        mounts.mount("tmpfs", str(root / "data"), "tmpfs", mounts.parse_options(list(options))[0])
        with ExitStack() as undo:
            assert share.add_volume(str(root / "data"), ["rbind"], undo)[1] == options
        mounts.detach(str(root / "data"))

    run(work)


def test_volumes_are_what_the_host_has(root: Path) -> None:
    """Also where the host shares none of its mounts, so that later ones never come into the daemon's namespace."""
    data = tree(root / "data")

    def inside() -> None:
        mounts.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE)
        host = mounts.enter_private_mount_namespace()
        share = SharedDir("s1")
        share.create(host)
        script = f"mount -t tmpfs tmpfs {data} && touch {data}/there"
        nsenter = ["nsenter", f"--mount=/proc/self/fd/{host}", "sh", "-c", script]
        subprocess.run(nsenter, check=True, pass_fds=[host])
        started = threading.Thread(target=threading.Event().wait, daemon=True)
        started.start()
        assert os.listdir(data) == []
        with ExitStack() as undo:
            assert os.listdir(on_host(share, volume(share, data, ["rbind"], undo))) == ["there"]
            assert os.listdir(on_host(share, share.add_rootfs("c1", [], data, undo))) == ["there"]
            mount = Mount(type="bind", source=str(data), options=["rbind"])
            assert os.listdir(on_host(share, share.add_rootfs("c2", [mount], data, undo))) == ["there"]
        assert os.listdir(data) == []
        share.remove()

    in_mount_namespace(inside)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "däta", "tab\there", "back\\slash", "line\nbreak", "日本"]
)
def test_removal_never_reaches_what_is_mounted(run: Run, root: Path, name: str) -> None:
    """The names of mount points come from the kernel in a notation of its own."""
    data = tree(root / name, "precious")

    def work(share: SharedDir) -> None:
        volume(share, data, ["rbind"], ExitStack())  # never undone: as after a crash
        share.add_rootfs("c1", [], data, ExitStack())

    run(work)
    assert (data / "precious").read_text() == "precious"


def test_missing_sources(run: Run, root: Path) -> None:
    def work(share: SharedDir) -> None:
        with ExitStack() as undo:
            with pytest.raises(InvalidRequest, match="/nothing does not exist"):
                share.add_rootfs("c1", [], root / "nothing", undo)
            with pytest.raises(InvalidRequest, match="/nothing into the container"):
                volume(share, root / "nothing", ["rbind"], undo)

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


@pytest.mark.parametrize("kind", ["format/mkdir/overlay", "mkfs/ext4", "mkdir/bind"])
def test_mounts_that_only_containerd_can_make(run: Run, root: Path, kind: str) -> None:
    def work(share: SharedDir) -> None:
        rootfs = [Mount(type=kind, source="overlay", options=["lowerdir={{ overlay 0 1 }}"])]
        with (
            ExitStack() as undo,
            pytest.raises(InvalidRequest, match=f"c1 has a mount of type {kind}, .*overlayfs$"),
        ):
            share.add_rootfs("c1", rootfs, root, undo)

    run(work)

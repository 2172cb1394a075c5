"""Copies of the host's directories: whatever was there before, the copy becomes what the host has sent."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_proto.gen.kata_py_agent_pb2 import MirrorEntry, UpdateMirrorRequest
from guest_agent.errors import InvalidRequest
from guest_agent.mirror import Mirrors

if TYPE_CHECKING:
    from pathlib import Path

    # By name: a directory, the bytes of a file, or where a link leads. With the mode of what has one.
    Tree = dict[str, "tuple[int, Tree | bytes | str]"]

DIRECTORY, FILE, LINK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK

names = st.sampled_from(["..data", "..1", "..2", "a", "b", "c"])
modes = st.sampled_from([0o400, 0o644, 0o755, 0o2770])
links = st.tuples(st.just(0o777), st.sampled_from(["..1", "..2", "..data/a", "nowhere"]))
files = st.tuples(modes, st.sampled_from([b"", b"one", b"two", b"x" * 5000]))
trees = st.recursive(
    st.dictionaries(names, st.one_of(links, files), max_size=4),
    lambda inner: st.dictionaries(
        names,
        st.one_of(links, files, st.tuples(st.sampled_from([0o755, 0o2750]), inner)),
        max_size=5,
    ),
    max_leaves=12,
)


def entries(tree: Tree, prefix: str = "") -> list[MirrorEntry]:
    """What the host would send."""
    found = [] if prefix else [entry(".", DIRECTORY | 0o755)]
    for name, (mode, what) in tree.items():
        path = prefix + name
        if isinstance(what, dict):
            found += [entry(path, DIRECTORY | mode), *entries(what, f"{path}/")]
        elif isinstance(what, bytes):
            found.append(entry(path, FILE | mode, what))
        else:
            found.append(entry(path, LINK | mode, what.encode()))
    return found


def entry(path: str, mode: int, data: bytes = b"") -> MirrorEntry:
    return MirrorEntry(path=path.encode(), mode=mode, uid=os.getuid(), gid=os.getgid(), data=data)


def seen(folder: Path) -> Tree:
    """The same of what is there."""
    tree: Tree = {}
    for path in folder.iterdir():
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            tree[path.name] = mode, os.readlink(path)
        elif path.is_dir():
            tree[path.name] = mode, seen(path)
        else:
            tree[path.name] = mode, path.read_bytes()
    return tree


async def send(mirrors: Mirrors, tree: Tree, *, size: int = 3, name: str = "m") -> None:
    sent = entries(tree)
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    for number, piece in enumerate(pieces, 1):
        request = UpdateMirrorRequest(name=name, first=number == 1, last=number == len(pieces), entries=piece)
        await mirrors.update(request)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(versions=st.lists(trees, min_size=1, max_size=4))
def test_it_becomes_what_was_sent(tmp_path: Path, versions: list[Tree]) -> None:
    async def run() -> None:
        mirrors = Mirrors(str(tmp_path))
        for tree in versions:
            await send(mirrors, tree)
            assert seen(tmp_path / "m" / "tree") == tree
            assert sorted(os.listdir(tmp_path / "m")) == ["tree"]
        await mirrors.remove("m")
        await mirrors.remove("m")
        assert os.listdir(tmp_path) == []

    asyncio.run(run())


def version(number: int, *keys: str) -> Tree:
    """A ConfigMap as a kubelet writes it."""
    name = f"..{number}"
    return {
        name: (0o755, {key: (0o644, f"{key}{number}".encode()) for key in keys}),
        "..data": (0o777, name),
        **{key: (0o777, f"..data/{key}") for key in keys},
    }


async def test_a_reader_finds_the_old_version_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at between any two steps: a key leads to the old text or to the new one, and all change in one step."""
    mirrors = Mirrors(str(tmp_path))
    await send(mirrors, version(1, "a", "b"))
    tree = tmp_path / "m" / "tree"
    states: list[tuple[str, str]] = []
    rename, unlink = os.rename, os.unlink

    def look() -> None:
        states.append(
            ((tree / "a").read_text(), (tree / "b").read_text() if (tree / "b").exists() else "gone")
        )

    def renamed(old: str, new: str) -> None:
        rename(old, new)
        look()

    def unlinked(path: str) -> None:
        unlink(path)
        look()

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "unlink", unlinked)
    await send(mirrors, version(2, "a", "c"))
    assert list(dict.fromkeys(states)) == [("a1", "b1"), ("a2", "gone")]
    assert (tree / "c").read_text() == "c2"


async def test_what_is_not_complete_is_not_seen(tmp_path: Path) -> None:
    mirrors = Mirrors(str(tmp_path))
    await send(mirrors, version(1, "a"))
    half = UpdateMirrorRequest(name="m", first=True, entries=entries(version(2, "b"))[:2])
    await mirrors.update(half)
    assert seen(tmp_path / "m" / "tree") == version(1, "a")
    await send(mirrors, version(3, "c"))
    assert seen(tmp_path / "m" / "tree") == version(3, "c")


async def test_equal_things_stay_what_they_were(tmp_path: Path) -> None:
    """Nobody is told of a change that there was not."""
    mirrors = Mirrors(str(tmp_path))
    await send(mirrors, version(1, "a"))
    before = (tmp_path / "m" / "tree" / "..1" / "a").stat().st_ino
    await send(mirrors, version(1, "a"))
    assert (tmp_path / "m" / "tree" / "..1" / "a").stat().st_ino == before


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "a/../../b", "a//b", "a/.", "a\0b", "./a"])
async def test_nothing_leaves_the_copy(tmp_path: Path, path: str) -> None:
    mirrors = Mirrors(str(tmp_path))
    request = UpdateMirrorRequest(name="m", first=True, entries=[entry(path, FILE | 0o644, b"x")])
    with pytest.raises(InvalidRequest, match="not a path in a mirror"):
        await mirrors.update(request)
    assert sorted(os.listdir(tmp_path)) == ["m"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0"])
async def test_odd_names(tmp_path: Path, name: str) -> None:
    mirrors = Mirrors(str(tmp_path))
    for call in (mirrors.update(UpdateMirrorRequest(name=name, first=True)), mirrors.remove(name)):
        with pytest.raises(InvalidRequest, match="cannot be the name of a mirror"):
            await call


async def test_no_devices(tmp_path: Path) -> None:
    request = UpdateMirrorRequest(name="m", first=True, entries=[entry("null", stat.S_IFCHR | 0o666)])
    with pytest.raises(InvalidRequest, match="no file of mode 20666"):
        await Mirrors(str(tmp_path)).update(request)

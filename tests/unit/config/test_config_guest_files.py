"""Host paths for every guest, and directories that containers share: what is adjusted and what is refused."""

import re

import pytest

from config.describe import show
from config.schema import SharedMount
from tests.unit.config.config_site import Site


def bind_mounts(site: Site, *entries: str) -> str:
    listed = ", ".join(f"'{entry.replace('@', str(site.root))}'" for entry in entries)
    return f"[hypervisor.qemu]\n{site.required()}[runtime]\nsandbox_bind_mounts = [{listed}]\n"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("@/kernel", "@/kernel:ro"),
        ("@/kernel:ro", "@/kernel:ro"),
        ("@/kernel:rw", "@/kernel:rw"),
        ("@/link:rw", "@/kernel:rw"),
        ("@/a:b", "@/a:b:ro"),
        ("@/a:b:rw", "@/a:b:rw"),
    ],
)
def test_a_path_and_its_mode(site: Site, entry: str, expected: str) -> None:
    (site.root / "a:b").mkdir()
    (site.root / "link").symlink_to("kernel")
    config = site.load(bind_mounts(site, entry)).config
    assert config.runtime.sandbox_bind_mounts == (expected.replace("@", str(site.root)),)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (["@/none"], "[0]: '@/none' is no absolute path of something that exists"),
        (["@/none:rw"], "[0]: '@/none' is no absolute path of something that exists"),
        (["@/kernel:rx"], "[0]: '@/kernel:rx' is no absolute path of something that exists"),
        (["kernel"], "[0]: 'kernel' is no absolute path of something that exists"),
        ([""], "[0]: '' is no absolute path of something that exists"),
        (["/"], "[0]: want a name that no other entry has, got ''"),
        (["@/kernel", "@/link:rw"], "[1]: want a name that no other entry has, got 'kernel'"),
    ],
)
def test_what_cannot_be_bound(site: Site, entries: list[str], problem: str) -> None:
    (site.root / "link").symlink_to("kernel")
    expected = re.sub("'(@.*)'", lambda found: show(found[1].replace("@", str(site.root))), problem)
    assert site.lines(bind_mounts(site, *entries)) == [f"{site.file}: runtime.sandbox_bind_mounts{expected}"]


def test_nothing_is_bound_where_nothing_is_shared(site: Site) -> None:
    text = bind_mounts(site, "@/kernel").replace("[runtime]", 'shared_fs = "none"\n[runtime]')
    (line,) = site.lines(text)
    assert line.startswith(
        f'{site.file}: runtime.sandbox_bind_mounts: nothing is shared with shared_fs = "none" (remove'
    )


GOOD = {"name": "n", "src_ctr": "a", "src_path": "/a/b.c", "dst_ctr": "b", "dst_path": "/b-1/"}


def shared_mount(site: Site, **changed: str) -> str:
    lines = "".join(f"{key} = '{value}'\n" for key, value in (GOOD | changed).items())
    return f"[hypervisor.qemu]\n{site.required()}[[runtime.shared_mounts]]\n{lines}"


def test_a_shared_mount(site: Site) -> None:
    assert site.load(shared_mount(site)).config.runtime.shared_mounts == (SharedMount(**GOOD),)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("src_ctr", "", "want a container's name, got ''"),
        ("dst_ctr", "", "want a container's name, got ''"),
        *(
            (key, path, f"want an absolute path of plain characters, got '{path}'")
            for key in ("src_path", "dst_path")
            for path in ("", "/", "a", "/a/../b", "/..", "/a b", "/a,b", "//a", "/é")
        ),
    ],
)
def test_what_cannot_be_shared(site: Site, key: str, value: str, problem: str) -> None:
    expected = [f"{site.file}: runtime.shared_mounts[0].{key}: {problem}"]
    assert site.lines(shared_mount(site, **{key: value})) == expected

"""Huge pages for volumes: how many are reserved, for whom, and what a guest says that has too few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from guest_agent import hugepages, storage
from guest_agent.errors import InvalidRequest, NotSupported, StateConflict
from guest_agent.storage import Storages

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 2 << 20


class Pool(hugepages.Reservation):
    """Pages of a guest that has memory for 10 of them."""

    most = 10

    def _set(self, pages: int) -> None:
        super()._set(min(pages, self.most))


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's file with their number."""
    monkeypatch.setattr(
        hugepages, "Reservation", lambda page, size: Pool(page, size, root=str(tmp_path / "sys"))
    )
    file = tmp_path / "sys" / "hugepages-2048kB" / "nr_hugepages"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    return file


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """File systems and their options."""
    seen: list[tuple[str, list[str]]] = []

    def mount(source: str, target: str, fstype: str, options: list[str]) -> None:
        if source == "broken":
            raise OSError(5, "Input/output error", target)
        seen.append((fstype, list(options)))

    monkeypatch.setattr(storage, "mount", mount)
    monkeypatch.setattr(storage, "unmount", lambda target: None)
    return seen


def volume(path: Path, size: int, *, source: str = "nodev", page: int = PAGE) -> pb.Storage:
    return pb.Storage(
        driver="ephemeral", source=source, fstype="hugetlbfs", mount_point=str(path / "huge"), shared=True,
        options=[f"pagesize={page},size={size}", "mode=2775", "fsgid=3000"],
    )  # fmt: skip


def storages() -> Storages:
    modules: Any = None
    return Storages(modules)


async def test_every_user_brings_pages_and_takes_them_along(
    tmp_path: Path, pages: Path, mounted: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_apply_fsgid", lambda storage: None)
    ours = storages()
    await ours.add([volume(tmp_path, 3 * PAGE)], "a")
    assert mounted == [("hugetlbfs", [f"pagesize={PAGE}", "mode=2775"])]
    assert pages.read_text() == "4"
    await ours.add([volume(tmp_path, PAGE + 1)], "b")
    await ours.add([volume(tmp_path, PAGE + 1)], "b")
    assert (len(mounted), pages.read_text()) == (1, "6")
    ours.release("a")
    ours.release("a")
    assert pages.read_text() == "3"
    ours.release("b")
    assert pages.read_text() == "1"


async def test_a_guest_with_too_little_memory(tmp_path: Path, pages: Path, mounted: list[object]) -> None:
    with pytest.raises(
        StateConflict, match=r"memory for 9 of 12 huge pages of 2048 KiB; it needs more memory"
    ):
        await storages().add([volume(tmp_path, 12 * PAGE)], "a")
    assert (pages.read_text(), mounted) == ("1", [])


async def test_a_mount_that_fails_gives_the_pages_back(
    tmp_path: Path, pages: Path, mounted: list[object]
) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        await storages().add([volume(tmp_path, PAGE, source="broken")], "a")
    assert pages.read_text() == "1"


async def test_pages_of_a_size_that_the_guest_does_not_have(tmp_path: Path, pages: Path) -> None:
    with pytest.raises(NotSupported, match=r"^huge pages of 1048576 KiB: "):
        await storages().add([volume(tmp_path, 1 << 30, page=1 << 30)], "a")


@pytest.mark.parametrize(
    "options", [[], ["size=1"], ["pagesize=2M"], ["pagesize=0"], ["pagesize=4096,size=x"]]
)
def test_odd_options(options: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="want pagesize and size in bytes"):
        hugepages.sizes(options)

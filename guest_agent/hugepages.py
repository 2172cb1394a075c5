"""Huge pages for volumes: taken out of the guest's memory when a container needs them, and given back after it."""

from __future__ import annotations

import os

from guest_agent.errors import InvalidRequest, NotSupported, StateConflict

ROOT = "/sys/kernel/mm/hugepages"


class Reservation:
    """`pages` of one size. Raises what `reserve` raises."""

    def __init__(self, page_bytes: int, size_bytes: int, root: str = ROOT) -> None:
        self._path = f"{root}/hugepages-{page_bytes >> 10}kB/nr_hugepages"
        self._pages = -(-size_bytes // page_bytes)
        if not os.path.exists(self._path):
            raise NotSupported(
                f"huge pages of {page_bytes >> 10} KiB: the guest's processor or kernel has none"
            )
        before = self._count()
        self._set(before + self._pages)
        if (there := self._count()) < before + self._pages:
            self._set(before)
            raise StateConflict(
                f"the guest has memory for {there - before} of {self._pages} huge pages of {page_bytes >> 10} KiB; "
                "it needs more memory (default_memory), or the container less of them"
            )

    def give_back(self) -> None:
        """Pages that are in use go when they are free. Raises OSError."""
        self._set(max(0, self._count() - self._pages))

    def _count(self) -> int:
        with open(self._path) as file:
            return int(file.read())

    def _set(self, pages: int) -> None:
        with open(self._path, "w") as file:
            file.write(str(pages))


def sizes(options: list[str]) -> tuple[int, int, list[str]]:
    """The size of a page, the bytes wanted, and the options that are left for mounting. They come as Kata's runtimes
    send them: several in one text, and in bytes.

    Raises:
        InvalidRequest: no size of a page, or no numbers.
    """
    words = [word for option in options for word in option.split(",") if word]
    values = dict(word.partition("=")[::2] for word in words)
    page, size = values.get("pagesize", ""), values.get("size", "0")
    if not (page.isdecimal() and size.isdecimal() and int(page) >= 1024):
        raise InvalidRequest(
            f"huge pages with the options {','.join(words)!r}: want pagesize and size in bytes"
        )
    return int(page), int(size), [word for word in words if not word.startswith(("size=", "fsgid="))]

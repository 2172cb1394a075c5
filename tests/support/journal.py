"""A list that grows while a test looks on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Far longer than anything waited for takes, and shorter than the time limit of a test: the message below then
# says what had come instead.
PATIENCE_S = 12.0


class Journal(Generic[T]):
    """What happened, in order, and a way to wait for what has not happened yet."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._grown = asyncio.Event()

    def add(self, item: T) -> None:
        """Append, and wake up who waits."""
        self.items.append(item)
        self._grown.set()

    async def until(self, condition: Callable[[list[T]], bool]) -> list[T]:
        """Wait until the condition holds for the items; returns a copy of them.

        Raises:
            AssertionError: it never did; shows the items.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition(self.items):
                    self._grown.clear()
                    await self._grown.wait()
        except TimeoutError:
            raise AssertionError(f"still waiting, with {self.items}") from None
        return list(self.items)

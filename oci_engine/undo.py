"""What `contextlib` has, as far as it is needed here: its import alone takes a fifth of an interpreter's start."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class suppress:
    """A block that ends early, and well, with one of these errors."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, self._kinds)


class Undo:
    """A block at whose end calls are made, the last one first, unless `keep` was called; also those after one that
    fails."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def callback(self, function: Callable[..., object], *arguments: object) -> None:
        self._calls.append(lambda: function(*arguments))

    def keep(self) -> None:
        """All of it worked."""
        self._calls.clear()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._calls:
            call = self._calls.pop()
            try:
                call()
            except BaseException:
                self.__exit__(None, None, None)
                raise

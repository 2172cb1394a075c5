"""Errors of the kernel with the step in which they came."""

from __future__ import annotations

import os

from oci_engine.errors import EngineError, SetupFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class step:
    """A block whose OSError becomes SetupFailed with this name. A class: generators cost more between fork and exec."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, EngineError):
            raise SetupFailed(f"{self._name}: {reason(error)}") from None


def reason(error: OSError) -> str:
    """The kernel's words, with the call or the file where known."""
    words = error.strerror or str(error)
    if error.errno and error.strerror and not error.strerror.endswith(os.strerror(error.errno)):
        words = f"{words} ({os.strerror(error.errno)})"
    return f"{words}: {error.filename}" if error.filename else words

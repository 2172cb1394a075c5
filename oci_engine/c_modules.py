"""The C halves of modules of the standard library whose Python halves load `enum`, for nicer names of numbers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

__all__ = ["signal"]

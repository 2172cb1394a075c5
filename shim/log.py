"""The shim's log: one logfmt line per event into the `log` fifo of the bundle, which containerd reads.

The fifo is opened for reading and writing and never blocks: a containerd that is away must neither kill us by
SIGPIPE nor stop us; what does not fit into the pipe meanwhile is lost.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

# structlog looks for rich, for terminals, of which there are none here. It is there for the other programs; loading it
# would take a fifth of the time until QEMU is started.
if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]  # an import fails
    import structlog

    del sys.modules["rich"]
else:
    import structlog

if TYPE_CHECKING:
    from pathlib import Path


def open_fifo(bundle: Path) -> int | None:
    """Make the bundle's log fifo our stderr, so that even a crash of the interpreter is told; None without one."""
    try:
        fd = os.open(bundle / "log", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    os.dup2(fd, 2)
    return fd


_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
# Control characters, which steer terminals: a guest's words end up in lines that people look at.
_ESCAPED = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}


class _FdLogger:
    """Where structlog's finished lines go."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def msg(self, message: str) -> None:
        """Write one line, or lose it when the pipe is full."""
        try:
            os.write(self._fd, f"{message.translate(_ESCAPED)}\n".encode(errors="replace"))
        except OSError:
            return

    log = debug = info = warning = warn = error = critical = fatal = exception = failure = msg


def configure(fd: int | None, *, debug: bool, sandbox: str, namespace: str) -> None:
    """Set up logging for this process, once: level, format, and the words that every line carries."""
    target = _FdLogger(2 if fd is None else fd)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("msg"),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "msg"], bool_as_flag=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=lambda *_: target,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(sandbox=sandbox, namespace=namespace)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="level=%(levelname)s msg=%(message)r"
    )


def number_of(level: str) -> int:
    """A level of the configuration as Python's logging counts them, which has nothing below debug."""
    return _LEVELS[level]


def set_levels(*levels: str) -> None:
    """From now on log what the most talkative of these levels of the configuration lets through."""
    least = min(map(number_of, levels))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(least))

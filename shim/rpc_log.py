"""One line in the log for every call of containerd's: which, on what, how it ended and how long it took.

Calls that change something are told at info, the others, which monitoring repeats for ever, at debug.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from ttrpc.service import Call, Next

log = structlog.get_logger()

_ONLY_LOOK = frozenset({"State", "Wait", "Pids", "Stats", "Connect"})


async def logged(call: Call, request: Any, next_step: Next) -> Any:
    """An interceptor for `ttrpc.Server`. What the handler raises passes through."""
    started = time.monotonic()
    ended = "ok"
    try:
        return await next_step(request, call)
    except BaseException as err:
        ended = f"{type(err).__name__}: {err}"
        raise
    finally:
        tell = log.debug if call.method in _ONLY_LOOK else log.info
        tell(
            "rpc_ended",
            rpc=call.method,
            container=getattr(request, "id", ""),
            exec=getattr(request, "exec_id", ""),
            ended=ended,
            seconds=round(time.monotonic() - started, 4),
        )

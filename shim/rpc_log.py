"""One line in the log for every call of containerd's: which, on what, how it ended and how long it took.

Calls that move a container are told at info. What monitoring, probes and terminals repeat for ever is told at debug:
calls that only look, calls on execs unless they fail, and those about a terminal's size or stdin.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from ttrpc.service import Call, Next

log = structlog.get_logger()

_QUIET = frozenset({
    "State", "Wait", "Pids", "Stats", "Connect", "ResizePty", "CloseIO",
    "Platform", "WaitSandbox", "SandboxStatus", "PingSandbox", "SandboxMetrics",
})  # fmt: skip


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
        of_exec = bool(getattr(request, "exec_id", ""))
        quiet = call.method in _QUIET or (of_exec and ended == "ok")
        tell = log.debug if quiet else log.info
        tell(
            "rpc_ended",
            rpc=call.method,
            container=getattr(request, "id", ""),
            exec=getattr(request, "exec_id", ""),
            ended=ended,
            seconds=round(time.monotonic() - started, 4),
        )

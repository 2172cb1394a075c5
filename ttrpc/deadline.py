"""Timeouts as they are given, in seconds, and deadlines as they are kept, in the time of the event loop."""

from __future__ import annotations

import asyncio
import math

from ttrpc.status import Code, RpcError


def deadline_exceeded() -> RpcError:
    return RpcError(Code.DEADLINE_EXCEEDED, "deadline exceeded")


def deadline_after(timeout_s: float | None) -> float | None:
    """None for no timeout, which an infinite one is too."""
    if timeout_s is None or timeout_s == math.inf:
        return None
    return asyncio.get_running_loop().time() + timeout_s


def remaining(deadline: float | None) -> float | None:
    """Seconds left, above 0; None for no deadline.

    Raises:
        RpcError: DEADLINE_EXCEEDED, nothing is left.
    """
    if deadline is None:
        return None
    left_s = deadline - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise deadline_exceeded()
    return left_s

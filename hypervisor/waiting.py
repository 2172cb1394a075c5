"""Waiting for what must be waited for, even by a task that is being cancelled."""

from __future__ import annotations

import asyncio
from typing import Any


async def outlast(future: asyncio.Future[Any]) -> None:
    """Return when `future` is done; a cancellation that arrives meanwhile is raised then, not before.

    Only for what is certain to end soon: a killed process, a connection that was shut down.
    The future's own outcome is left to the caller.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is not None:
        raise cancelled

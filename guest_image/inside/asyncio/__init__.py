# mypy: ignore-errors
"""The event loop, tasks and what waits on them; no streams, processes, threads or TLS."""

from asyncio.base_events import *  # noqa: F403
from asyncio.events import *  # noqa: F403
from asyncio.exceptions import *  # noqa: F403
from asyncio.futures import *  # noqa: F403
from asyncio.locks import *  # noqa: F403
from asyncio.protocols import *  # noqa: F403
from asyncio.tasks import *  # noqa: F403
from asyncio.timeouts import *  # noqa: F403
from asyncio.transports import *  # noqa: F403
from asyncio.unix_events import SelectorEventLoop
from asyncio.unix_events import SelectorEventLoop as new_event_loop

__all__ = ["SelectorEventLoop", "new_event_loop"]

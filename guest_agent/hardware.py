"""Looking for hardware that is plugged in: where the kernel shows it, and waiting until it does."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from guest_agent.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.uevent import Uevents


class HardwareFinder:
    """Waits `patience_s` seconds for a thing at most. `load` loads a kernel module that is not built in."""

    def __init__(
        self,
        uevents: Uevents,
        load: Callable[[str], None],
        *,
        patience_s: float,
        sys: str = "/sys",
        dev: str = "/dev",
    ) -> None:
        self._uevents = uevents
        self._load = load
        self._patience_s = patience_s
        self._sys = sys
        self._dev = dev

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds, which says that `what` is there. Raises NotFound when it does not come."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._uevents.until(condition)
        except TimeoutError:
            raise NotFound(
                f"the guest did not see {what} within {self._patience_s:g} s; "
                "agent.hotplug_timeout in kernel_params gives it more"
            ) from None

    def root_bus(self, name: str) -> str | None:
        """The directory of PCI's root bus `name`: of ACPI's devices, or of a board that a device tree describes."""
        devices = f"{self._sys}/devices"
        boards = (f"{devices}/platform/{board}/{name}" for board in names_in(f"{devices}/platform"))
        return next((path for path in (f"{devices}/{name}", *boards) if os.path.isdir(path)), None)


def names_in(directory: str) -> list[str]:
    """What is in a directory; nothing when there is none."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []

"""PID 1. Makes the host able to reach us first, and imports the rest while the host connects."""

from __future__ import annotations

import gc
import os
import time


def main() -> None:
    """Never returns: the machine stops when the agent does."""
    started_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    # Imports create tens of thousands of objects that live for ever; collecting among them is wasted time.
    gc.disable()
    from guest_agent import syscalls

    try:
        _live(started_s)
    except BaseException as err:
        _report(err)
    os.sync()
    # The host runs QEMU with -no-reboot, so this ends the machine, and needs no power button.
    syscalls.reboot(syscalls.RB_AUTOBOOT)


def _live(started_s: float) -> None:
    from guest_agent import cmdline, init
    from guest_agent.modules import Modules

    modules = Modules()
    settings = init.boot(modules)
    listener = init.listen(cmdline.port(settings.server_addr))
    log_listener = init.listen(settings.log_vport) if settings.log_vport else None
    if settings.ready_vport:
        try:
            init.tell_ready(settings.ready_vport, started_s)
        except OSError as err:
            settings.problems.append(f"the host did not take the ready signal: {err}")

    from guest_agent.log import Log

    log = Log(settings.log_level)
    for problem in settings.problems:
        log.warning("start_problem", problem=problem)

    from guest_agent.server import run

    log.info("agent_started", init_s=started_s, imported_s=time.clock_gettime(time.CLOCK_BOOTTIME))
    run(listener, log_listener, settings, modules, log)


def _report(error: BaseException) -> None:
    """Say on the console why the machine stops; the host quotes its last lines."""
    import traceback

    os.write(1, b"agent: critical: the guest stops\n" + "".join(traceback.format_exception(error)).encode())

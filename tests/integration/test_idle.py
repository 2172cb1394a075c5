"""A container that does nothing for longer than any call may take: its shim does nothing either, and then all works."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.integration.faults import parts
from tests.integration.terminal import Terminal

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd

# Other runtimes lost such an exec after thirty seconds, by a time limit of theirs for reading from it.
IDLE_S = 40.0
# Nothing wakes a shim up by itself. What may is from before: the last frames of the guest's, the timer of a call.
WAKE_UPS = 10
CPU_NS = 20_000_000


def wake_ups(pid: int) -> int:
    """How often all threads of the process went to sleep so far."""
    texts = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)


def cpu_ns(pid: int) -> int:
    """Nanoseconds on a processor of all its threads (Linux, Documentation/scheduler/sched-stats)."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def test_shim_sleeps_and_wakes_up(containerd: Containerd) -> None:
    container = containerd.start("sleep", "1000")
    try:
        fifos = containerd.server.fifo_options()
        options = ["tasks", "exec", *fifos, "--tty", "--exec-id", containerd.new_id("e"), container, "sh"]
        argv = containerd.server.ctr_argv(*options, namespace=containerd.namespace)
        with Terminal(argv, rows=20, columns=60) as terminal:
            terminal.read_until("[#$] ")
            shim = parts(container)["shim"]
            before, cpu_before = wake_ups(shim), cpu_ns(shim)
            time.sleep(IDLE_S)
            assert wake_ups(shim) - before <= WAKE_UPS
            assert cpu_ns(shim) - cpu_before < CPU_NS
            terminal.resize(40, 120)
            terminal.type("until [ \"$(stty size)\" = '40 120' ]; do :; done; echo resi''zed; exit 6\n")
            terminal.read_until("resized\r+\n")
            assert terminal.process.wait(timeout=60) == 6
    finally:
        containerd.remove(container)

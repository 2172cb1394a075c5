"""A `ctr run` cut into phases: nothing is counted twice or left out, and a gap in what was seen is told."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bench.errors import BenchError
from bench.process_events import Life
from bench.timeline import REST, Run, phases, sandbox_up_s

CONTAINERD, CTR, START, DAEMON, QEMU, DELETE = 10, 20, 30, 31, 40, 50
# Added to our monotonic seconds it gives the log's time of day.
OFFSET = 1_700_000_000.0


def line(at_s: float, msg: str, words: str, sandbox: str = "c1") -> str:
    stamp = datetime.fromtimestamp(OFFSET + at_s, UTC).isoformat().replace("+00:00", "Z")
    return f"timestamp={stamp} level=info msg={msg} {words} namespace=n sandbox={sandbox}\n"


LOG = "".join(
    [
        line(0.0, "sandbox_up", "agent_ready_s=1 agent_s=2 sandbox_s=3 init_s=1 ready_s=2", sandbox="other"),
        'time="2026-01-01T00:00:00Z" level=info msg="containerd\'s own"\n',
        line(101.4, "machine_started", f"pid={QEMU} vm=sandbox-c1"),
        # The daemon's clock began at 101.1; the guest's init at 103.0 of ours, listening at 104.0.
        line(104.3, "sandbox_up", "agent_ready_s=2.9 agent_s=3.0 init_s=1.5 ready_s=2.5 sandbox_s=3.2"),
        line(104.5, "rpc_ended", "rpc=Create seconds=3.0"),
        line(104.8, "rpc_ended", "rpc=Start seconds=0.2"),
        line(104.9, "process_exited", "status=0"),
        line(105.2, "rpc_ended", "rpc=Delete seconds=0.1"),
        line(105.4, "rpc_ended", "rpc=Shutdown seconds=0.1"),
    ]
)
LIVES = (
    Life(CTR, 1, 100.0, 100.0, 106.0),
    Life(START, CONTAINERD, 100.9, 100.9, 101.05),
    Life(DAEMON, START, 101.0, None, 105.5),
    Life(QEMU, DAEMON, 101.3, 101.3, 105.3),
    Life(DELETE, CONTAINERD, 105.6, 105.6, 105.7),
)


def run(lives: tuple[Life, ...] = LIVES) -> Run:
    return Run("c1", 100.0, 106.0, CONTAINERD, lives, OFFSET)


def test_phases_follow_each_other_and_add_up() -> None:
    found = phases(run(), LOG)
    assert sum(found.values()) == pytest.approx(6.0)
    assert found == pytest.approx(
        {
            # to `start`, to Start, to Delete, to Shutdown, to `delete`, to the end
            REST: 0.9 + 0.1 + 0.2 + 0.1 + 0.2 + 0.3,
            "start helper": 0.1,
            "shim, until QEMU is started": 0.3,
            "QEMU and kernel, to the agent's first line": 1.7,
            "agent, to listening": 1.0,
            "agent connected": 0.1,
            "sandbox created": 0.2,
            "container created": 0.2,
            "process started": 0.2,
            "process runs and exits": 0.1,
            "delete": 0.1,
            "shutdown": 0.1,
            "delete helper": 0.1,
        },
        abs=1e-3,
    )


def test_an_exit_before_its_start_was_answered_takes_no_time_of_its_own() -> None:
    early = LOG.replace(line(104.9, "process_exited", "status=0"), line(104.7, "process_exited", "status=0"))
    found = phases(run(), early)
    assert found["process runs and exits"] == 0.0
    assert sum(found.values()) == pytest.approx(6.0)


@pytest.mark.parametrize(
    "missing", ["machine_started", "sandbox_up agent_ready_s=2.9", "rpc=Start", "rpc=Shutdown"]
)
def test_a_gap_in_the_log_is_told(missing: str) -> None:
    log = "".join(text for text in LOG.splitlines(keepends=True) if missing not in text)
    with pytest.raises(BenchError, match="no line about"):
        phases(run(), log)


@pytest.mark.parametrize("missing", [START, DAEMON, QEMU, DELETE])
def test_a_process_that_was_not_seen_is_told(missing: int) -> None:
    with pytest.raises(BenchError, match=r"seen|saw"):
        phases(run(tuple(life for life in LIVES if life.pid != missing)), LOG)


def test_a_log_line_without_its_number_is_told() -> None:
    with pytest.raises(BenchError, match="'sandbox_up' has no agent_ready_s"):
        phases(run(), LOG.replace("agent_ready_s=2.9 ", ""))


def test_how_long_a_sandbox_took_is_its_own() -> None:
    assert sandbox_up_s("c1", LOG) == 3.2
    assert sandbox_up_s("other", LOG) == 3.0
    with pytest.raises(BenchError, match="c2"):
        sandbox_up_s("c2", LOG)

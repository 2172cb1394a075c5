"""The kernel's process events, as bytes of its connector's messages."""

from __future__ import annotations

import struct

from bench.process_events import Life, ProcessEvents

FORK, EXEC, EXIT = 1, 2, 0x80000000
US = 100


def message(what: int, at_ns: int, *details: int) -> bytes:
    return bytes(16 + 20) + struct.pack(f"=IIQ{len(details)}I", what, 0, at_ns, *details)


def test_a_life_from_fork_to_exit() -> None:
    events = ProcessEvents(US)
    events.take(message(FORK, 1_000_000_000, US, US, 200, 200))
    events.take(message(EXEC, 1_500_000_000, 200, 200))
    # A thread of the parent forks: the child belongs to the process.
    events.take(message(FORK, 2_000_000_000, 203, 200, 300, 300))
    events.take(message(EXIT, 3_000_000_000, 200, 200, 0, 17, US, US))
    assert events.born_since(0) == [Life(200, US, 1.0, 1.5, 3.0), Life(300, 200, 2.0)]
    assert events.born_since(1.1) == [Life(300, 200, 2.0)]


def test_threads_and_strangers_are_not_counted() -> None:
    events = ProcessEvents(US)
    events.take(message(FORK, 1, US, US, 201, US))  # a new thread
    events.take(message(FORK, 1, 1, 1, 400, 400))  # somebody else's child
    events.take(message(EXEC, 2, 400, 400))
    events.take(message(EXIT, 3, 400, 400, 0, 17, 1, 1))
    assert events.born_since(0) == []


def test_the_end_of_a_thread_is_not_the_end_of_its_process() -> None:
    events = ProcessEvents(US)
    events.take(message(FORK, 1_000_000_000, US, US, 200, 200))
    events.take(message(EXIT, 2_000_000_000, 201, 200, 0, 17, US, US))
    assert events.born_since(0)[0].exited_s is None


def test_the_number_of_an_ended_process_may_come_back() -> None:
    events = ProcessEvents(US)
    for at_ns in (1_000_000_000, 3_000_000_000):
        events.take(message(FORK, at_ns, US, US, 200, 200))
        events.take(message(EXIT, at_ns + 500_000_000, 200, 200, 0, 17, US, US))
    assert [(life.forked_s, life.exited_s) for life in events.born_since(0)] == [(1.0, 1.5), (3.0, 3.5)]

"""`--tty`: one stream for both outputs, line editing by the guest's terminal, and its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.terminal import Terminal

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd


def test_session_with_resize(containerd: Containerd) -> None:
    arguments = containerd.run_arguments(containerd.new_id(), ["sh"], options=["--rm", "--tty"])
    argv = containerd.server.ctr_argv(*arguments, namespace=containerd.namespace)
    with Terminal(argv, rows=31, columns=97) as terminal:
        terminal.read_until("[#$] ", timeout_s=120)
        terminal.type("stty size; test -t 0 && test -t 1 && test -t 2 && echo all''-tty\n")
        seen = terminal.read_until("all-tty\r+\n")
        assert "31 97" in seen
        terminal.resize(40, 120)
        # Resizing is told from afar: ask until the guest's terminal has it, as a person would look again.
        terminal.type("until [ \"$(stty size)\" = '40 120' ]; do :; done; echo resi''zed\n")
        terminal.read_until("resized\r+\n")
        terminal.type("exit 4\n")
        assert terminal.process.wait(timeout=60) == 4


def test_exec_with_a_terminal(containerd: Containerd) -> None:
    container = containerd.start("sleep", "1000")
    try:
        exec_with_a_terminal(containerd, container)
    finally:
        containerd.remove(container)


def exec_with_a_terminal(containerd: Containerd, container: str) -> None:
    fifos = containerd.server.fifo_options()
    options = ["tasks", "exec", *fifos, "--tty", "--exec-id", containerd.new_id("e"), container, "sh"]
    argv = containerd.server.ctr_argv(*options, namespace=containerd.namespace)
    with Terminal(argv, rows=20, columns=60) as terminal:
        terminal.read_until("[#$] ")
        terminal.type("stty size\n")
        terminal.read_until("20 60")
        terminal.type("exit 6\n")
        assert terminal.process.wait(timeout=60) == 6

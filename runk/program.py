"""Where the launcher begins: as little as possible before the program is what it is going to be."""

from __future__ import annotations

import gc
import os
import sys

#: Verbs in which a process of ours enters a container.
ENTERING = frozenset({"create", "run", "exec"})


def main() -> None:
    """Never returns."""
    # A caller may have closed them, and then files of ours would get their numbers.
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # A word that only looks like such a verb costs a moment, and nothing else.
    # Who may not write to the interpreter, cannot from a container either.
    if ENTERING.intersection(sys.argv[1:]) and os.access("/proc/self/exe", os.W_OK):
        from runk.sealed import run_sealed

        try:
            run_sealed()
        except OSError as err:
            sys.exit(f"runk: {sys.executable} cannot be protected from containers: {err}")
    gc.disable()  # nothing of what is made from here on is garbage before the end
    from runk.cli import run

    # The interpreter would put away one by one what the kernel is about to take as a whole.
    os._exit(run(sys.argv[1:]))

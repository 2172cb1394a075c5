# mypy: ignore-errors
"""Runs in the guest, as its first program: the agent, and beside it a process that runs crun when the host says so.

The host connects to the port, sends a container's id as a line, and then a byte for each `crun exec ID true`; each is
answered by a line with the nanoseconds from before the start of crun to after its end.
"""

import bundle

bundle.install()

import os  # noqa: E402
import time  # noqa: E402

import guest_agent.__main__ as agent  # noqa: E402
from guest_agent import crun, init  # noqa: E402

PORT = 1032  # as in guest_exec.py
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def serve(listener):
    fd, _ = listener._accept()
    container = b""
    while not container.endswith(b"\n"):
        container += os.read(fd, 1)
    argv = [
        "crun",
        "--root",
        "/run/kata-py/crun",
        "--cgroup-manager",
        "cgroupfs",
        "exec",
        container.strip().decode(),
    ]
    # Started from its file, crun would start itself once more from memory.
    program = crun.Crun(None)._executable()
    while os.read(fd, 1):
        began = time.monotonic_ns()
        pid = os.posix_spawn(program, [*argv, "true"], ENVIRONMENT)
        _, status = os.waitpid(pid, 0)
        took = time.monotonic_ns() - began if status == 0 else -1
        os.write(fd, b"%d\n" % took)


def tell_ready(*args):
    """Called when the root file system is in its place; what is started before would see another."""
    listener = init.listen(PORT)
    if os.fork() == 0:
        try:
            serve(listener)
        finally:
            os._exit(0)
    listener.close()
    told(*args)


told = init.tell_ready
init.tell_ready = tell_ready
agent.main()

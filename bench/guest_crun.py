# mypy: ignore-errors
"""Runs in the guest, as its first program: the agent, and beside it a process that runs crun when the host says so.

When the host connects to the port, it makes a container of its own with crun. Then the host sends a byte for each
measurement: EXEC for a `crun exec true` in it, WHOLE for another container from its creation to its removal, with a
crun for each verb. Each is answered by a line with the nanoseconds from before the start of crun to after its end, or
-1 when it failed.
"""

import bundle

bundle.install()

import os  # noqa: E402
import select  # noqa: E402
import time  # noqa: E402

import guest_agent.__main__ as agent  # noqa: E402
from guest_agent import init  # noqa: E402

PORT = 1032  # as in guest_exec.py
PROGRAM, BUNDLE, WHOLE_BUNDLE = "/usr/bin/crun", "/bench/bundle", "/bench/whole"  # likewise
EXEC, WHOLE = b"e", b"w"  # likewise
STATE, PID_FILE = "/run/crun", "/run/crun.pid"
WORDS = ("crun", "--root", STATE, "--cgroup-manager", "cgroupfs")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def in_memory(path):
    """Started from its file, crun would start itself once more from memory."""
    fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb") as program:
        while os.sendfile(fd, program.fileno(), None, 1 << 24):
            pass
    os.fchmod(fd, 0o755)
    # A file that is open for writing cannot be executed.
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return f"/proc/self/fd/{reading}"


def run(program, *words):
    pid = os.posix_spawn(program, [*WORDS, *words], ENVIRONMENT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole(program):
    """A container that runs `true`: whether it was made, has ended, and was removed."""
    if run(program, "create", "--bundle", WHOLE_BUNDLE, "--pid-file", PID_FILE, "whole") != 0:
        return False
    with open(PID_FILE) as file:
        process = os.pidfd_open(int(file.read()))
    started = run(program, "start", "whole") == 0
    if started:
        ended = select.poll()
        ended.register(process, select.POLLIN)
        ended.poll()
    os.close(process)
    return run(program, "delete", "--force", "whole") == 0 and started


def serve(listener):
    fd, _ = listener._accept()
    program = in_memory(PROGRAM)
    made = run(program, "run", "--detach", "--bundle", BUNDLE, "crun") == 0
    while asked := os.read(fd, 1):
        began = time.monotonic_ns()
        done = whole(program) if asked == WHOLE else made and run(program, "exec", "crun", "true") == 0
        os.write(fd, b"%d\n" % (time.monotonic_ns() - began if done else -1))


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

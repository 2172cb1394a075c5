"""Becoming the user of a specification, with its rights, and finding its program. Runs in the new process."""

from __future__ import annotations

import os
import stat
import struct

from oci_engine import capabilities, inroot, linux
from oci_engine.errors import CannotExecute, SetupFailed
from oci_engine.steps import step
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import ProcessPlan
    from oci_engine.spec import Scheduler

NOT_EXECUTABLE = 126
NOT_FOUND = 127
#: Bytes of /etc/passwd that are read; more users than this have no home here.
_PASSWD_LIMIT = 1 << 20
#: What execvp(3) and other runtimes search when the environment has no PATH.
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment(root: int, process: ProcessPlan) -> dict[str, str]:
    """The variables, the last of each name, and HOME by the container's own /etc/passwd if it is missing."""
    variables: dict[str, str] = {}
    for entry in process.env:
        name, _, value = entry.partition("=")
        variables[name] = value
    if not variables.get("HOME"):
        variables["HOME"] = _home(inroot.read_text(root, "etc/passwd", _PASSWD_LIMIT), process.uid)
    return variables


def _home(passwd: str, uid: int) -> str:
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) > 5 and fields[2] == str(uid) and fields[5]:
            return fields[5]
    return "/"


def enter_directory(cwd: str) -> None:
    """Raises SetupFailed also for a directory outside of the container, where an open file may lead."""
    with step(f"process.cwd: {cwd}"):
        os.chdir(cwd)
    try:
        inside = os.getcwd().startswith("/")
    except FileNotFoundError:
        inside = False
    if not inside:
        raise SetupFailed(f"process.cwd: {cwd} leads out of the container")


def find_program(name: str, variables: dict[str, str]) -> str:
    """By PATH if there is no slash in the name. Raises CannotExecute."""
    if not name:
        raise CannotExecute("process.args[0]: the program's name is empty", NOT_FOUND)
    if "/" in name:
        found = [name]
    else:
        folders = variables.get("PATH", _DEFAULT_PATH).split(":")
        found = [f"{folder or '.'}/{name}" for folder in folders]
    why = CannotExecute(
        f'exec: "{name}": executable file not found in $PATH'
        if "/" not in name
        else f'exec: "{name}": no such file or directory',
        NOT_FOUND,
    )
    for path in found:
        try:
            mode = os.stat(path).st_mode
        except OSError as err:
            if isinstance(err, PermissionError):
                why = CannotExecute(f'exec: "{name}": permission denied', NOT_EXECUTABLE)
            continue
        if stat.S_ISDIR(mode):
            why = CannotExecute(f'exec: "{name}": is a directory', NOT_EXECUTABLE)
        elif os.access(path, os.X_OK, effective_ids=True):
            return path
        else:
            why = CannotExecute(f'exec: "{name}": permission denied', NOT_EXECUTABLE)
    raise why


def set_limits(process: ProcessPlan) -> None:
    """Resource limits, scheduling and personality: while there still are the rights for it."""
    for limit in process.rlimits:
        with step(f"process.rlimits: {limit.name}"):
            linux.setrlimit(limit.resource, limit.soft, limit.hard)
    if process.scheduler is not None:
        with step("process.scheduler"):
            linux.sched_setattr(_sched_attr(process.scheduler))
    if process.io_priority is not None:
        with step("process.ioPriority"):
            linux.ioprio_set(process.io_priority)
    if process.personality is not None:
        with step("linux.personality"):
            linux.personality(process.personality)


def _sched_attr(scheduler: Scheduler) -> bytes:
    return struct.pack(
        "=IIQiIQQQ", 48, scheduler.policy, scheduler.flags, scheduler.nice, scheduler.priority,
        scheduler.runtime, scheduler.deadline, scheduler.period,
    )  # fmt: skip


def own_streams(uid: int) -> None:
    """Let the user open /dev/stdout and its like again, which looks at the owner of the pipe or terminal."""
    null = os.makedev(1, 3)
    for fd in (0, 1, 2):
        details = os.fstat(fd)
        if details.st_uid != uid and details.st_rdev != null:
            with suppress(OSError):  # not possible for every kind of file, and then not needed
                os.fchown(fd, uid, -1)


def set_labels(proc: int, process: ProcessPlan) -> None:
    """For the coming exec. `proc` is a proc file system of our own, which nobody can have put something else over."""
    for label, place, file in (
        (process.apparmor_profile, "process.apparmorProfile", "self/attr/apparmor/exec"),
        (process.selinux_label, "process.selinuxLabel", "self/attr/exec"),
    ):
        if label:
            text = f"exec {label}" if "apparmor" in file else label
            with step(f"{place}: {label}"):
                write_below(proc, file, text)


def write_below(folder: int, path: str, text: str) -> None:
    """Write a kernel's file without leaving the folder's file system."""
    how = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_XDEV
    fd = linux.openat2(folder, path, os.O_WRONLY, how)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def become(process: ProcessPlan) -> None:
    """Groups, user and capabilities; the bounding set first, while there is the right to."""
    with step("process.capabilities.bounding"):
        capabilities.limit_bounding(process.bounding, process.last_capability)
    with step("process.user"):
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)
        _set_groups(process)
        os.setresgid(process.gid, process.gid, process.gid)
        os.setresuid(process.uid, process.uid, process.uid)
    with step("process.capabilities"):
        known = (1 << process.last_capability + 1) - 1
        capabilities.set_all(
            process.effective & known, process.permitted & known, process.inheritable & known,
            process.ambient & known,
        )  # fmt: skip
        linux.prctl(linux.PR_SET_KEEPCAPS, 0)
    os.umask(process.umask)


def _set_groups(process: ProcessPlan) -> None:
    try:
        os.setgroups(process.groups)
    except PermissionError:
        # A user namespace in which groups cannot be changed at all: only a wish for some is an error.
        if process.groups:
            raise

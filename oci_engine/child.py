"""The new process, from fork to exec: carries out a plan.

Namespaces in part hold only for the children of who takes them. A thread of the caller's can take all but those of
users and clocks, and the process is made by it, inside of them (`enter`, `run_inside`). With those, there are two
processes (`run`): the first takes the namespaces, the second one is its sibling, lives in all of them, and becomes the
container's. None of them touches an object of the caller that could be locked, nor any file that is not in the plan.
"""

from __future__ import annotations

import _socket
import fcntl
import gc
import os
import struct

from oci_engine import channel, hooks, identity, linux
from oci_engine.c_modules import signal
from oci_engine.console import open_terminal, show_as_console, take_terminal
from oci_engine.errors import CannotExecute, EngineError, HookFailed
from oci_engine.mounts import new_filesystem
from oci_engine.rootfs import Rootfs, root_directory
from oci_engine.steps import reason, step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from oci_engine.plan import Plan

_FAILED = 1
#: Bytes that a FIFO takes at once, whoever reads them (PIPE_BUF).
_START_TEXT = 4096
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def run(plan: Plan) -> NoReturn:
    """Called in the child of a fork whose signals are blocked. Never returns."""
    _carry_out(plan, _take_namespaces)


def enter(plan: Plan) -> None:
    """Called in a thread of the caller's that ends afterwards, or forks and ends: it is in the plan's namespaces, and
    its files are the plan's. The caller's other threads keep theirs.

    The one of control groups is left for the process: it is made around the group that its maker is in.
    """
    linux.unshare(linux.CLONE_FS | linux.CLONE_FILES)
    _take_files(plan)
    with step("linux.namespaces"):
        _join(plan.namespaces.joined)
        linux.unshare(plan.namespaces.unshared & ~linux.CLONE_NEWCGROUP)


def run_inside(plan: Plan) -> NoReturn:
    """Called in the child of a fork by such a thread, with signals blocked. Never returns."""
    _carry_out(plan, _begin_inside)


def _carry_out(plan: Plan, begin: Callable[[Plan], NoReturn]) -> NoReturn:
    status = _FAILED
    try:
        gc.disable()  # finalisers of the caller's objects are the caller's
        _forget_signals()
        begin(plan)
    except channel.Closed:
        status = _FAILED  # the caller is gone, and nobody waits for what would have become
    except CannotExecute as err:
        status = err.status
        channel.send_error(plan.channel, str(err), status)
    except EngineError as err:
        channel.send_error(plan.channel, str(err))
    except OSError as err:
        channel.send_error(plan.channel, reason(err))
    except BaseException as err:  # a defect of ours has to reach the caller as well
        channel.send_error(plan.channel, f"internal error: {type(err).__name__}: {err}")
    finally:
        os._exit(status)


def _forget_signals() -> None:
    """The caller's handlers would run here, and wake the caller's event loop."""
    signal.set_wakeup_fd(-1)
    # Of SIGPIPE later: a caller that is gone must be seen as an error.
    for number in range(1, signal.NSIG):
        # 32 and 33 are libc's own. Setting one takes the kernel, asking the interpreter for one does not.
        if number not in (signal.SIGPIPE, 32, 33) and signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _take_files(plan: Plan) -> None:
    os.umask(0o022)  # directories that are made for mounts must not depend on the caller's
    _set_streams(plan.stdio)
    _close_others(plan)


def _close_others(plan: Plan) -> None:
    """Leave only what the plan names: a directory of the host that stays open is a way out of the container."""
    trees = (mount.tree for mount in plan.root.mounts) if plan.root else ()
    joined = (fd for fd, _ in plan.namespaces.joined)
    named = {0, 1, 2, *plan.preserved, *trees, *joined}
    named |= {plan.channel, plan.start_fifo, plan.console_socket} - {-1}
    first = 0
    for fd in sorted(fd for fd in named if fd >= 0):
        if fd > first:
            linux.close_range(first, fd - 1)
        first = fd + 1
    linux.close_range(first)


def _begin_inside(plan: Plan) -> NoReturn:
    channel.receive(plan.channel)  # from now on in the container's cgroup
    with step("linux.namespaces"):
        linux.unshare(plan.namespaces.unshared & linux.CLONE_NEWCGROUP)
    _become(plan)


def _take_namespaces(plan: Plan) -> NoReturn:
    _take_files(plan)
    # Without root, the caller may not map ids of a process that it cannot look into; it comes after that then.
    if os.geteuid() == 0:
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
    channel.receive(plan.channel)  # from now on in the container's cgroup
    namespaces = plan.namespaces
    with step("linux.namespaces"):
        _join(namespaces.joined)
        if namespaces.unshared & linux.CLONE_NEWUSER:
            linux.unshare(linux.CLONE_NEWUSER)
            channel.send(plan.channel, event="user")
            channel.receive(plan.channel)  # ids are mapped
        if namespaces.unshared & linux.CLONE_NEWUSER or _joins_user(namespaces.joined):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            # Changing ids makes it so anyway; stated because what follows relies on it.
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
        linux.unshare(namespaces.unshared & ~linux.CLONE_NEWUSER)
    if namespaces.time_offsets:
        # For the next process. Its file is root's of the host, since this process cannot be looked into.
        channel.send(plan.channel, event="time")
        channel.receive(plan.channel)
    pid = linux.clone_sibling()
    if pid != 0:
        channel.send(plan.channel, event="forked", pid=pid)
        os._exit(0)
    channel.receive(plan.channel)
    _become(plan)


def _become(plan: Plan) -> NoReturn:
    os.setsid()
    if plan.start_fifo >= 0:
        _become_container(plan)
    else:
        _become_exec(plan)


def _joins_user(joined: tuple[tuple[int, int], ...]) -> bool:
    return any(kind == linux.CLONE_NEWUSER for _, kind in joined)


def _join(joined: tuple[tuple[int, int], ...]) -> None:
    """Some belong to the user namespace that is joined too, and need its rights; others need those of before."""
    later: list[tuple[int, int]] = []
    for fd, kind in joined:
        try:
            if kind == linux.CLONE_NEWUSER:
                later.insert(0, (fd, kind))
            else:
                linux.setns(fd, kind)
        except PermissionError:
            later.append((fd, kind))
    for fd, kind in later:
        linux.setns(fd, kind)
    for fd, _ in joined:
        os.close(fd)


def _become_container(plan: Plan) -> NoReturn:
    process, namespaces = plan.process, plan.namespaces
    if process.keyring:
        with step("session keyring"):
            linux.join_session_keyring(process.keyring)
    if namespaces.loopback:
        with step("loopback interface"):
            _raise_loopback()
    proc = _own_proc() if namespaces.sysctl or process.apparmor_profile or process.selinux_label else -1
    rootfs = Rootfs(plan.root) if plan.root else None
    if rootfs:
        rootfs.mount()
    if plan.wait_for_hooks:
        channel.send(plan.channel, event="mounted")
        channel.receive(plan.channel)
    for hook in plan.create_hooks:
        hooks.run(hook, hooks.seen_from_inside(plan.hook_state, "creating"), "createContainer")
    if namespaces.hostname:
        with step("hostname"):
            _socket.sethostname(namespaces.hostname)
    if namespaces.domainname:
        with step("domainname"):
            linux.setdomainname(namespaces.domainname)
    if rootfs:
        peer = open_terminal(rootfs.fd, process, plan.console_socket) if process.terminal else -1
        if peer >= 0:
            show_as_console(rootfs.fd, peer)
        rootfs.finish()
        rootfs.enter()
    else:
        peer = _terminal_here(plan)
    for key, value in namespaces.sysctl:
        with step(f"linux.sysctl[{key!r}]"):
            path = key if "/" in key else key.replace(".", "/")
            identity.write_below(proc, f"sys/{path}", value)
    _execute(plan, peer, proc)


def _become_exec(plan: Plan) -> NoReturn:
    process = plan.process
    if process.keyring:
        with step("session keyring"):
            linux.join_session_keyring(process.keyring)
    proc = _own_proc() if process.apparmor_profile or process.selinux_label else -1
    _execute(plan, _terminal_here(plan), proc)


def _terminal_here(plan: Plan) -> int:
    """Of the file system that this process is in already; -1 if it has none."""
    if not plan.process.terminal:
        return -1
    root = root_directory()
    peer = open_terminal(root, plan.process, plan.console_socket)
    os.close(root)
    return peer


def _own_proc() -> int:
    """A proc file system that nobody else can see or put something over."""
    with step("proc file system"):
        return new_filesystem("proc", "proc", (), 0)


def _raise_loopback() -> None:
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
    finally:
        any_socket.close()


def _execute(plan: Plan, peer: int, proc: int) -> NoReturn:
    process = plan.process
    if peer >= 0:
        take_terminal(peer)
    identity.own_streams(process.uid)
    identity.set_limits(process)
    if proc >= 0:
        identity.set_labels(proc, process)
        os.close(proc)
    if process.no_new_privileges:
        with step("process.noNewPrivileges"):
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    elif process.seccomp is not None:
        # Needs a right that is about to go.
        _install_filter(plan)
    root = root_directory()
    variables = identity.environment(root, process)
    os.close(root)
    try:
        identity.enter_directory(process.cwd)
        identity.become(process)
    except EngineError:
        # A directory that only the user may enter, as on NFS.
        identity.become(process)
        identity.enter_directory(process.cwd)
    program = identity.find_program(process.args[0], variables)
    # With a listener, while the caller is there to hand that on.
    early = process.no_new_privileges and process.seccomp_flags & linux.SECCOMP_FILTER_FLAG_NEW_LISTENER
    if early:
        _install_filter(plan)
    if plan.start_fifo >= 0:
        channel.send(plan.channel, event="ready")
        os.read(plan.start_fifo, 1)
    for hook in plan.start_hooks:
        try:
            hooks.run(hook, hooks.seen_from_inside(plan.hook_state, "created"), "startContainer")
        except HookFailed as err:
            # To whoever starts the container, and looks into this when our end of it closes.
            os.write(plan.start_fifo, str(err).encode()[:_START_TEXT])
            os._exit(_FAILED)
    for fd in plan.preserved:
        os.set_inheritable(fd, True)
    # Ignored until now, and what is ignored stays so over an exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if process.no_new_privileges and process.seccomp is not None and not early:
        _install_filter(plan)
    try:
        os.execve(program, process.args, variables)  # noqa: S606 - that is what all this is for
    except OSError as err:
        status = identity.NOT_FOUND if isinstance(err, FileNotFoundError) else identity.NOT_EXECUTABLE
        raise CannotExecute(f'exec: "{process.args[0]}": {err.strerror}', status) from None


def _set_streams(stdio: tuple[int, int, int]) -> None:
    """Before anything is opened, which could get one of these numbers."""
    if stdio != (0, 1, 2):
        # Away from 0 to 2 first: one of them may be in the way of another.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in stdio]
        for number, fd in enumerate(high):
            os.dup2(fd, number)
            os.close(fd)
    for number in (0, 1, 2):
        os.set_inheritable(number, True)


def _install_filter(plan: Plan) -> None:
    process = plan.process
    assert process.seccomp is not None
    with step("linux.seccomp"):
        listener = linux.seccomp_filter(process.seccomp, process.seccomp_flags)
    if process.seccomp_flags & linux.SECCOMP_FILTER_FLAG_NEW_LISTENER:
        # Until the caller has handed it on, nobody answers. It closes with the exec.
        channel.send(plan.channel, event="listener", number=listener)
        channel.receive(plan.channel)

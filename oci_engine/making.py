"""Makes containers, and processes in them: what is prepared before the fork, and undone when it fails."""

from __future__ import annotations

import _socket
import os
import time

from oci_engine import hooks, json_text
from oci_engine.cgroups.base import remove_cgroup
from oci_engine.cgroups.find import find_cgroup, known_cgroup, unit_name
from oci_engine.errors import EngineError, HookFailed, SetupFailed, SpecError, StateConflict
from oci_engine.plan import Plan
from oci_engine.planner import CLONE_FLAGS, FILES, plan_namespaces, plan_process, plan_root
from oci_engine.reader import Reader
from oci_engine.records import Record, replace
from oci_engine.seccomp import compile_filter
from oci_engine.spawn import spawn
from oci_engine.spec import read_process, read_spec
from oci_engine.state import CREATING, STOPPED, Status, Store, is_alive, start_time
from oci_engine.steps import step
from oci_engine.undo import Undo, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.cgroups.group import Cgroup
    from oci_engine.options import CreateOptions, ExecOptions, Streams
    from oci_engine.plan import RootPlan
    from oci_engine.spawn import Spawned
    from oci_engine.spec import Process, Spec
    from oci_engine.waiting import Wait, Warn


class Known(Record):
    """A container as its maker knows it. Reading its specification again for each exec would take longer than the exec.

    `seccomp` is the filter as a program.
    """

    status: Status
    spec: Spec
    seccomp: bytes | None


def known_by(status: Status) -> Known:
    """Out of a container's record. Raises SpecError, SetupFailed for a filter that cannot be made."""
    spec = read_spec(status.spec)
    return Known(status=status, spec=spec, seccomp=_filter(spec))


def _filter(spec: Spec) -> bytes | None:
    return compile_filter(spec.linux.seccomp) if spec.linux.seccomp else None


def create(
    store: Store, container_id: str, bundle: str, options: CreateOptions, wait: Wait, warn: Warn
) -> Known:
    """Its process is a child of the caller, and waits for `start`.

    Raises SpecError, AlreadyExists, SetupFailed, HookFailed; then nothing is left.
    """
    bundle = os.path.realpath(bundle)
    document = _load_json(f"{bundle}/config.json")
    spec = read_spec(document)
    process = _checked_process(spec, options.streams)
    for text in process.unknown_capabilities:
        warn(text)
    rootfs = _rootfs(spec, bundle)
    store.reserve(container_id)
    # Nobody else makes one of this id, or ends it, before what fails here has been undone.
    with store.locked(container_id), Undo() as undo:
        undo.callback(store.remove, container_id)
        cgroup = find_cgroup(
            spec.linux.cgroups_path,
            container_id,
            systemd=options.systemd_cgroup,
            rootless=options.rootless,
        )
        _make_cgroup(cgroup, spec, undo)
        status = Status(
            oci_version=spec.version,
            id=container_id,
            pid=0,
            root=store.root,
            bundle=bundle,
            rootfs=rootfs,
            process_start_time=0,
            created=_now(),
            owner=os.geteuid(),
            cgroup_paths=cgroup.paths,
            cgroups_path=spec.linux.cgroups_path,
            unit=unit_name(cgroup),
            no_pivot=options.no_pivot,
            no_new_keyring=options.no_new_keyring,
            spec=document,
        )
        known = Known(status=status, spec=spec, seccomp=_filter(spec))
        if spec.hooks["poststop"]:
            undo.callback(_poststop, spec, status, wait, warn)
        status = _make_process(store, known, process, cgroup, options, wait, undo)
        _write_pid_file(options.pid_file, status.pid)
        undo.keep()
    return replace(known, status=status)


def _make_process(
    store: Store,
    known: Known,
    process: Process,
    cgroup: Cgroup,
    options: CreateOptions,
    wait: Wait,
    undo: Undo,
) -> Status:
    status, spec = known.status, known.spec
    fifo = store.fifo(status.id)
    with Undo() as files:
        os.mkfifo(f"{fifo}.new", 0o600)
        undo.callback(_unlink, f"{fifo}.new")
        start_fifo = os.open(f"{fifo}.new", os.O_RDWR | os.O_CLOEXEC)
        files.callback(os.close, start_fifo)
        joined = _open_namespaces(spec, files)
        makes_users = spec.linux.namespaces.get("user") == ""
        if spec.linux.uid_mappings and not makes_users:
            from oci_engine.mapped_binds import check_mappings

            check_mappings(spec, joined, wait)
        console = _console(options.streams, files)
        root = _plan_root(known, cgroup, options, joined, files, wait)
        keyring = "" if options.no_new_keyring else f"_ses.{status.id}"
        process_plan = plan_process(process, spec, seccomp=known.seccomp, keyring=keyring)
        early = [*spec.hooks["prestart"], *spec.hooks["createRuntime"]]
        state = hooks.state_text(status, CREATING)

        def plan(channel: int) -> Plan:
            return Plan(
                namespaces=plan_namespaces(spec, joined),
                root=root,
                process=process_plan,
                create_hooks=spec.hooks["createContainer"],
                start_hooks=spec.hooks["startContainer"],
                hook_state=state,
                wait_for_hooks=bool(early),
                channel=channel,
                start_fifo=start_fifo,
                console_socket=console,
                stdio=options.streams.stdio,
                preserved=_preserved(options.streams),
            )

        spawned = spawn(
            plan,
            placed=cgroup.add,
            wait=wait,
            uid_mappings=spec.linux.uid_mappings if makes_users else (),
            gid_mappings=spec.linux.gid_mappings if makes_users else (),
            oom_score_adj=process.oom_score_adj,
        )
    with Undo() as channel:
        channel.callback(spawned.close)
        undo.callback(spawned.kill)
        status = replace(status, pid=spawned.pid, process_start_time=start_time(spawned.pid))
        store.save(status)
        if spec.linux.net_devices:
            from oci_engine.net_devices import moved

            with moved(spec.linux.net_devices, spawned.pid):
                _set_up(spawned, status, spec, wait, early_hooks=bool(early))
        else:
            _set_up(spawned, status, spec, wait, early_hooks=bool(early))
    os.rename(f"{fifo}.new", fifo)
    return status


def _plan_root(
    known: Known,
    cgroup: Cgroup,
    options: CreateOptions,
    joined: tuple[tuple[int, int], ...],
    files: Undo,
    wait: Wait,
) -> RootPlan | None:
    """None for a mount namespace that is joined, which has everything already."""
    status, spec = known.status, known.spec
    if spec.linux.namespaces["mount"]:
        return None
    root = plan_root(
        spec,
        rootfs=status.rootfs,
        bundle=status.bundle,
        no_pivot=status.no_pivot,
        cgroup_mounts=cgroup.mounts(),
        bind_devices=options.rootless or "user" in spec.linux.namespaces,
    )
    # Without root there is no opening beforehand, and nobody's folder is closed to who makes the container.
    if (root.bind_devices and not options.rootless) or any(each.options.idmap for each in root.mounts):
        from oci_engine.mapped_binds import with_trees

        return with_trees(root, spec, joined, files, wait)
    return root


def _poststop(spec: Spec, status: Status, wait: Wait, warn: Warn) -> None:
    """Of a container that could not be made. They may undo what hooks before them have done."""
    for hook in spec.hooks["poststop"]:
        try:
            hooks.run(hook, hooks.state_text(status, STOPPED), "poststop", wait)
        except HookFailed as err:
            warn(str(err))


def _set_up(spawned: Spawned, status: Status, spec: Spec, wait: Wait, *, early_hooks: bool) -> None:
    spawned.go_on()
    if early_hooks:
        spawned.wait_for("mounted")
        state = hooks.state_text(status, CREATING)
        for kind in ("prestart", "createRuntime"):
            for hook in spec.hooks[kind]:
                hooks.run(hook, state, kind, wait)
        spawned.go_on()
    if spec.linux.seccomp and spec.linux.seccomp.listener_path:
        from oci_engine.seccomp_listener import hand_over

        hand_over(spawned, spec.linux.seccomp, hooks.state_text(status, CREATING))
    spawned.wait_for("ready")


def exec_process(
    known: Known, document: dict[str, object], options: ExecOptions, wait: Wait, warn: Warn, state: str
) -> tuple[int, int]:
    """One more process, by its JSON object, in a container of this state.

    Returns its pid, a child of the caller, and its start time.

    Raises StateConflict, SpecError, SetupFailed, CannotExecute.
    """
    status, spec = known.status, known.spec
    with Undo() as files:
        process = _exec_process(document, spec, options.streams)
        for text in process.unknown_capabilities:
            warn(text)
        joined = _open_process_namespaces(status, files)
        console = _console(options.streams, files)
        keyring = "" if status.no_new_keyring else f"_ses.{status.id}"
        process_plan = plan_process(process, spec, seccomp=known.seccomp, keyring=keyring)
        cgroup = known_cgroup(status)

        def plan(channel: int) -> Plan:
            return Plan(
                namespaces=replace(
                    plan_namespaces(spec, joined), unshared=0, time_offsets="", loopback=False, sysctl=()
                ),
                root=None,
                process=process_plan,
                channel=channel,
                console_socket=console,
                stdio=options.streams.stdio,
                preserved=_preserved(options.streams),
            )

        def placed(pid: int) -> None:
            _set_cpus(pid, process.exec_cpus_initial, "process.execCPUAffinity.initial")
            cgroup.add(pid)

        spawned = spawn(plan, placed=placed, wait=wait, oom_score_adj=process.oom_score_adj)
        files.callback(spawned.close)
        began = start_time(spawned.pid)
        try:
            _set_cpus(spawned.pid, process.exec_cpus_final, "process.execCPUAffinity.final")
            spawned.go_on()
            if spec.linux.seccomp and spec.linux.seccomp.listener_path:
                from oci_engine.seccomp_listener import hand_over

                hand_over(spawned, spec.linux.seccomp, hooks.state_text(status, state))
            spawned.wait_for_exec()
            _write_pid_file(options.pid_file, spawned.pid)
        except BaseException:
            spawned.kill()
            raise
    return spawned.pid, began


def _set_cpus(pid: int, cpus: frozenset[int], place: str) -> None:
    if cpus:
        with step(place):
            os.sched_setaffinity(pid, cpus)


def _load_json(path: str) -> dict[str, object]:
    try:
        with open(path) as file:
            document = json_text.loads(file.read())
    except FileNotFoundError:
        raise SpecError(path, "there is no such file; a bundle has its specification there") from None
    except ValueError as err:
        raise SpecError(path, f"is no JSON document: {err}") from None
    if not isinstance(document, dict):
        raise SpecError(path, "is no JSON object")
    return document


def _checked_process(spec: Spec, streams: Streams) -> Process:
    if spec.process is None:
        raise SpecError("process", "is missing")
    _check_terminal(spec.process, streams)
    return spec.process


def _check_terminal(process: Process, streams: Streams) -> None:
    has_console = bool(streams.console_socket) or streams.console >= 0
    if process.terminal and not has_console:
        raise SpecError(
            "process.terminal", "a terminal needs a console socket to send it to (--console-socket)"
        )
    if has_console and not process.terminal:
        raise SpecError("process.terminal", "there is a console socket, but the process wants no terminal")


def _rootfs(spec: Spec, bundle: str) -> str:
    path = os.path.realpath(os.path.join(bundle, spec.root.path))
    if not os.path.isdir(path):
        raise SpecError("root.path", f"{path} is no directory")
    if path == "/":
        raise SpecError("root.path", "is the host's own root")
    return path


def _make_cgroup(cgroup: Cgroup, spec: Spec, undo: Undo) -> None:
    strangers = cgroup.pids()
    if strangers:
        raise SetupFailed(
            f"linux.cgroupsPath: the control group {next(iter(cgroup.paths.values()))} has processes already:"
            f" {', '.join(map(str, strangers[:5]))}"
        )
    undo.callback(remove_cgroup, cgroup)
    cgroup.create()
    cgroup.limit(spec.linux.resources)
    # Only root gives groups away.
    uid = _owner_of_group(spec) if spec.linux.uid_mappings and os.geteuid() == 0 else None
    if uid is not None:
        from oci_engine.cgroups.v2 import CgroupV2

        if isinstance(cgroup, CgroupV2):
            cgroup.give_to(uid)


def _owner_of_group(spec: Spec) -> int | None:
    """The container's user as the host knows it, if it sees its group as the top of a tree and may write to it."""
    writable = any(mount.type == "cgroup" and "ro" not in mount.options for mount in spec.mounts)
    if not writable or spec.linux.namespaces.get("cgroup") != "" or spec.process is None:
        return None
    uid = spec.process.user.uid
    for each in spec.linux.uid_mappings:
        if each.container <= uid < each.container + each.size:
            return each.host + uid - each.container
    return None


def _open_namespaces(spec: Spec, files: Undo) -> tuple[tuple[int, int], ...]:
    joined = []
    # The mount namespace last: paths of the others are the caller's.
    for kind, path in sorted(spec.linux.namespaces.items(), key=lambda entry: entry[0] == "mount"):
        if path:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as err:
                raise SpecError("linux.namespaces", f"{kind}: {path}: {err.strerror}") from None
            files.callback(os.close, fd)
            joined.append((fd, CLONE_FLAGS[kind]))
    return tuple(joined)


def _open_process_namespaces(status: Status, files: Undo) -> tuple[tuple[int, int], ...]:
    """Those of the container's process that are not the caller's own; the mount namespace last."""
    joined = []
    for kind, name in FILES.items():
        try:
            fd = os.open(f"/proc/{status.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            files.callback(os.close, fd)
            own = os.stat(f"/proc/thread-self/ns/{name}")
        except FileNotFoundError:
            continue  # a kind that the kernel does not have, or no process: the next lines tell
        if os.fstat(fd).st_ino != own.st_ino:
            joined.append((fd, CLONE_FLAGS[kind]))
    if not is_alive(status):  # only now it is certain whose they are
        raise StateConflict("cannot exec in a stopped container")
    return tuple(joined)


def _exec_process(document: dict[str, object], spec: Spec, streams: Streams) -> Process:
    """What it does not say itself about rights is as for the container's first process."""
    process = read_process(Reader(document, "process"))
    _check_terminal(process, streams)
    first = spec.process
    assert first is not None
    return replace(
        process,
        capabilities=first.capabilities if process.capabilities is None else process.capabilities,
        apparmor_profile=process.apparmor_profile or first.apparmor_profile,
        selinux_label=process.selinux_label or first.selinux_label,
        oom_score_adj=first.oom_score_adj if process.oom_score_adj is None else process.oom_score_adj,
        exec_cpus_initial=process.exec_cpus_initial or first.exec_cpus_initial,
        exec_cpus_final=process.exec_cpus_final or first.exec_cpus_final,
    )


def _console(streams: Streams, files: Undo) -> int:
    path = streams.console_socket
    if not path:
        return streams.console
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    files.callback(connection.close)
    try:
        connection.connect(path)
    except OSError as err:
        raise EngineError(f"console socket {path}: {err.strerror}") from None
    return connection.fileno()


def _preserved(streams: Streams) -> tuple[int, ...]:
    fds = tuple(range(3, 3 + streams.preserve_fds))
    for fd in fds:
        with suppress(OSError):
            if os.get_inheritable(fd):
                continue
        # Or it is one of this program's own, which close on exec: a folder of the host's, for example.
        raise EngineError(f"file descriptor {fd} is to be preserved, but the caller has not opened it")
    return fds


def _write_pid_file(path: str, pid: int) -> None:
    """In one step: callers wait for the file and read it at once."""
    if path:
        folder, name = os.path.split(path)
        fresh = os.path.join(folder, f".{name}")
        with open(fresh, "w") as file:
            file.write(str(pid))
        os.replace(fresh, path)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _now() -> str:
    """UTC, RFC 3339 with nanoseconds."""
    ns = time.time_ns()
    seconds, rest = divmod(ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"

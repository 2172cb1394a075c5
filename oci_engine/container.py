"""A container's verbs: what each does in which state."""

from __future__ import annotations

import errno
import os
import select

from oci_engine import hooks
from oci_engine.c_modules import signal
from oci_engine.cgroups.base import remove_cgroup, signal_each
from oci_engine.cgroups.find import known_cgroup
from oci_engine.errors import HookFailed, NotFound, SetupFailed, StateConflict
from oci_engine.records import replace
from oci_engine.state import (
    CREATED,
    CREATING,
    PAUSED,
    RUNNING,
    STOPPED,
    Status,
    Store,
    has_fifo,
    is_alive,
    opened_process,
)
from oci_engine.undo import suppress
from oci_engine.waiting import wait_for_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_engine.making import Known
    from oci_engine.options import CreateOptions, ExecOptions
    from oci_engine.waiting import Wait, Warn

#: How long a killed process may take to be gone. One that waits for a dead network file system takes forever.
_KILL_TIMEOUT_S = 10.0
#: What a created process waits for.
_GO = b"\0"


class Engine:
    """The containers whose state is below one folder."""

    def __init__(self, root: str, wait: Wait = wait_for_child, warn: Warn = lambda text: None) -> None:
        """`wait` is for a caller that collects its children itself; those of containers are its own in any case.

        `warn` is told, by the thread that calls a verb, what the specification wants a warning for.
        """
        self._store = Store(root)
        self._wait = wait
        self._warn = warn
        self._made: dict[str, Known] = {}  # by this object; others are read from their records

    # Making

    def create(self, container_id: str, bundle: str, options: CreateOptions) -> int:
        """Returns the pid of the container's process, a child of the caller, which waits for `start`.

        Raises SpecError, AlreadyExists, SetupFailed, HookFailed; then nothing is left.
        """
        # Only here and in `exec`: what most calls of a command line do not need is not loaded for them.
        from oci_engine.making import create

        known = create(self._store, container_id, bundle, options, self._wait, self._warn)
        self._made[container_id] = known
        return known.status.pid

    def start(self, container_id: str) -> None:
        """Returns when the program has been executed, or could not be. Raises StateConflict, HookFailed."""
        with self._store.locked(container_id):
            status = self._status(container_id)
            state = self.state_of(status)
            if state != CREATED:
                raise StateConflict(f"cannot start a container in the {state} state")
            _let_go(self._store.fifo(container_id))
            try:
                for hook in hooks.of(status, "poststart"):
                    hooks.run(hook, hooks.state_text(status, RUNNING), "poststart", self._wait)
            except HookFailed:
                self._end(status)
                raise

    def exec(self, container_id: str, document: dict[str, object], options: ExecOptions) -> tuple[int, int]:
        """One more process, by its JSON object. Returns its pid, a child of the caller, and its start time.

        Raises StateConflict, SpecError, SetupFailed, CannotExecute.
        """
        from oci_engine.making import exec_process, known_by

        with self._store.locked(container_id):
            status = self._status(container_id)
            state = self.state_of(status)
            if state not in (CREATED, RUNNING):
                raise StateConflict(f"cannot exec in a {state} container")
            known = self._made.get(container_id) or known_by(status)
            return exec_process(known, document, options, self._wait, self._warn, state)

    def _status(self, container_id: str) -> Status:
        """The caller holds the container's lock: it is there."""
        known = self._made.get(container_id)
        return known.status if known is not None else self._store.load(container_id)

    # Looking

    def load(self, container_id: str) -> Status:
        """Raises NotFound."""
        return self._store.load(container_id)

    def ids(self) -> list[str]:
        return self._store.ids()

    def state_of(self, status: Status) -> str:
        if not is_alive(status):
            return STOPPED
        fifo = self._store.fifo(status.id)
        if has_fifo(f"{fifo}.new"):
            return CREATING
        if known_cgroup(status).is_frozen():
            return PAUSED
        return CREATED if has_fifo(fifo) else RUNNING

    def pids(self, container_id: str) -> list[int]:
        """Of all its processes."""
        return known_cgroup(self.load(container_id)).pids()

    def stats(self, container_id: str) -> dict[str, object]:
        """Raises StateConflict when there is nothing to measure."""
        status = self.load(container_id)
        if self.state_of(status) == STOPPED:
            raise StateConflict(f"container {container_id} is not running")
        return known_cgroup(status).stats()

    # Changing

    def kill(self, container_id: str, number: int, *, everyone: bool = False) -> None:
        """A signal to the container's process, or to all. Raises StateConflict."""
        with self._store.locked(container_id):
            status = self._store.load(container_id)
            state = self.state_of(status)
            cgroup = known_cgroup(status)
            if everyone:
                if number == signal.SIGKILL:
                    cgroup.kill()
                else:
                    signal_each(cgroup.pids, number)
                return
            if state == STOPPED:
                raise StateConflict(
                    f"container not running: cannot kill container {container_id}, it is stopped"
                )
            if number == signal.SIGKILL and not _has_pid_namespace(status):
                cgroup.kill()  # the kernel ends the others only along with a PID namespace
                return
            _signal(status, number)
            if number == signal.SIGKILL and state == PAUSED and "" not in cgroup.paths:
                cgroup.freeze(False)

    def pause(self, container_id: str) -> None:
        with self._store.locked(container_id):
            status = self._store.load(container_id)
            state = self.state_of(status)
            if state not in (CREATED, RUNNING):
                raise StateConflict(f"cannot pause a container in the {state} state")
            known_cgroup(status).freeze(True)

    def resume(self, container_id: str) -> None:
        with self._store.locked(container_id):
            status = self._store.load(container_id)
            state = self.state_of(status)
            if state != PAUSED:
                raise StateConflict(f"cannot resume a container in the {state} state")
            known_cgroup(status).freeze(False)

    def update(self, container_id: str, resources: dict[str, object]) -> None:
        """Other limits; what is not in `resources` stays. Raises SpecError, SetupFailed, StateConflict."""
        with self._store.locked(container_id):
            status = self._status(container_id)
            if self.state_of(status) == STOPPED:
                raise StateConflict("cannot update a container in the stopped state")
            from oci_engine.reader import Reader
            from oci_engine.resources_spec import read_resources

            wanted = read_resources(Reader(resources, "resources"))
            known_cgroup(status).limit(wanted, devices=bool(resources.get("devices")))

    def delete(self, container_id: str, *, force: bool = False) -> list[str]:
        """Returns what went wrong and does not matter. Raises NotFound unless by force, StateConflict."""
        try:
            with self._store.locked(container_id):
                return self._delete_locked(container_id, force=force)
        except NotFound:
            if not force:
                raise
            return []

    def forget(self, container_id: str) -> None:
        """Of one whose processes and control group the caller has removed. No error if there is nothing."""
        self._made.pop(container_id, None)
        self._store.remove(container_id)

    def _delete_locked(self, container_id: str, *, force: bool) -> list[str]:
        try:
            status = self._store.load(container_id)
        except NotFound:
            self._store.remove(container_id)  # nothing in it says what else there could be
            return []
        state = self.state_of(status)
        if state not in (STOPPED, CREATED) and not force:
            raise StateConflict(f"cannot delete container {container_id} that is not stopped: {state}")
        self._end(status)
        complaints = []
        for hook in hooks.of(status, "poststop"):
            try:
                hooks.run(hook, hooks.state_text(replace(status, pid=0), STOPPED), "poststop", self._wait)
            except HookFailed as err:
                complaints.append(str(err))
        remove_cgroup(known_cgroup(status))
        self.forget(container_id)
        return complaints

    def _end(self, status: Status) -> None:
        """Every process, and its end. Raises SetupFailed for one that does not end."""
        cgroup = known_cgroup(status)
        cgroup.kill()
        with suppress(ProcessLookupError):
            pidfd = opened_process(status.pid)
            try:
                if not is_alive(status):
                    return
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(_KILL_TIMEOUT_S * 1000):
                    raise SetupFailed(
                        f"process {status.pid} of container {status.id} has not ended {_KILL_TIMEOUT_S:.0f} s after"
                        " it was killed"
                    )
            finally:
                os.close(pidfd)


def _let_go(fifo: str) -> None:
    """Returns when the process at its other end has executed its program, or could not. Raises HookFailed."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        if err.errno != errno.ENXIO:
            raise
        # Nobody has its other end: the process has ended since.
        raise StateConflict(f"cannot start a container in the {STOPPED} state") from None
    try:
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, _GO)
    finally:
        os.close(fd)
    try:
        os.unlink(fifo)
        # Its end closes with the exec. What it says before that is what kept it from that.
        poll = select.poll()
        poll.register(reading, 0)
        poll.poll()
        said = os.read(reading, 4096)
    finally:
        os.close(reading)
    if said == _GO:  # which it never took
        raise StateConflict(f"cannot start a container in the {STOPPED} state")
    if said:
        raise HookFailed(said.decode(errors="replace"))


def _signal(status: Status, number: int) -> None:
    """Never to another process that has got the same pid meanwhile."""
    try:
        pidfd = opened_process(status.pid)
    except ProcessLookupError:
        raise StateConflict(f"container not running: container {status.id} has just ended") from None
    try:
        if not is_alive(status):
            raise StateConflict(f"container not running: container {status.id} has just ended")
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        raise StateConflict(f"container not running: container {status.id} has just ended") from None
    finally:
        os.close(pidfd)


def _has_pid_namespace(status: Status) -> bool:
    linux: Any = status.spec.get("linux") or {}
    return any(each.get("type") == "pid" for each in linux.get("namespaces") or ())

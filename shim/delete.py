"""The `delete` action: clean up after a shim, in a fresh process, whether or not it left anything.

containerd runs this after every exit of a shim, also the normal ones, and the client waits for it. When nothing is
left it costs an interpreter start and a few look-ups.
"""

import os
import time

from shim import paths
from shim.protowire import bytes_field, int_field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.cli import Flags

# 128 + SIGKILL: what containerd reports for a task whose shim died before telling its exit status.
_EXIT_STATUS = 137
# Of version 2, and that hierarchy of version 1 which every host has.
_CGROUPS = (paths.CGROUP_ROOT, f"{paths.CGROUP_ROOT}/cpu")


def delete(flags: "Flags") -> bytes:
    """Remove what is left of the container, and return the serialized `containerd.task.v2.DeleteResponse`.

    Raises:
        OSError, ValueError: what could not be removed, or a malformed id.
    """
    bundle = flags.bundle or os.getcwd()
    if not paths.valid_id(flags.id):
        raise ValueError(f"need -id, got {flags.id!r}")
    # A container of a pod has nothing on the host that is not the sandbox's: the pod's shim, or the clean-up of the
    # sandbox itself, sees to it.
    groups = (top + group for top in _CGROUPS for group in paths.overhead_groups(flags.id))
    if any(map(_exists, (paths.run_dir(flags.id), paths.shared_dir(flags.id), *groups))):
        from shim.cleanup import clean_up

        clean_up(flags.id)
    else:
        paths.remove_empty_parents()  # whoever removed the sandbox's directories may have left these
    _remove_dead_socket(bundle)
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    exited_at = int_field(1, seconds) + int_field(2, nanoseconds)
    return int_field(2, _EXIT_STATUS) + bytes_field(3, exited_at)


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _remove_dead_socket(bundle: str) -> None:
    """Unlink the socket that the bundle's `address` names when nobody listens on it any more."""
    try:
        with open(f"{bundle}/address") as file:
            path = file.read().removeprefix("unix://")
    except OSError:
        return
    if path and _exists(path):
        from shim.start import remove_dead_socket

        remove_dead_socket(path)

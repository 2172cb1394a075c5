"""Where a sandbox's state lives on the host. Plain strings: `start` and `delete` cannot afford pathlib."""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable

RUN_ROOT = "/run/kata-py"
# In the sandbox's directory: what it was configured with, and why.
CONFIG_FILE = "config.json"
# Likewise: the disk with the guest's initial data.
INITDATA_FILE = "initdata.image"
# Kata's own place for the directories that the guest sees, so that its tools find them.
SHARED_ROOT = "/run/kata-containers/shared/sandboxes"

# Of version 2; of version 1 its folders are hierarchies.
CGROUP_ROOT = "/sys/fs/cgroup"

# The annotations that say whether a container is a pod's sandbox or joins one, and which one it joins:
# containerd's CRI plugin, CRI-O, dockershim. The first that is present decides.
POD_ANNOTATIONS = (
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id"),
)


def run_dir(sandbox_id: str) -> str:
    """The sandbox's private directory, mode 0700: record, sockets, console log."""
    return f"{RUN_ROOT}/{sandbox_id}"


def management_socket(sandbox_id: str) -> str:
    """Where one asks the sandbox's daemon about its volumes."""
    return f"{run_dir(sandbox_id)}/shim-monitor.sock"


def shared_dir(sandbox_id: str) -> str:
    """Parent of `rw` (where things are mounted) and `ro` (the view of it that the guest gets)."""
    return f"{SHARED_ROOT}/{sandbox_id}"


def overhead_groups(sandbox_id: str) -> "tuple[str, str]":
    """The control groups for what a sandbox costs beside its pod, below each hierarchy, called as Kata calls them:
    where groups are named plainly, and where they have systemd's names."""
    return f"/kata_overhead/{sandbox_id}", f"/kata-overhead.slice/kata-py-{sandbox_id}.scope"


def make_dir(path: str) -> None:
    """Make a sandbox's own directory, mode 0700, and its parents, which all sandboxes share. The last sandbox to end
    removes the parents, perhaps at this very moment: then they are made once more.

    Raises:
        OSError: not allowed, or the place is taken.
    """
    while True:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path, 0o700)
        except FileNotFoundError:
            continue
        return


def remove_empty_parents() -> None:
    """Remove the directories that all sandboxes share when this was the last."""
    shared = os.path.dirname(SHARED_ROOT)
    for directory in (SHARED_ROOT, shared, os.path.dirname(shared), RUN_ROOT):
        try:
            os.rmdir(directory)
        except OSError:  # somebody else's, or not there
            continue


def socket_path(socket_dir: str, grpc_address: str, namespace: str, sandbox_id: str) -> str:
    """The shim's socket: a hash keeps it inside the 107 bytes that a Unix address may have."""
    sha256 = _sha256()
    name = f"{grpc_address}/{namespace}/{sandbox_id}"
    return f"{socket_dir}/{sha256(name.encode()).hexdigest()}"


def _sha256() -> "Callable[[bytes], hashlib._Hash]":
    """SHA-256 without `hashlib`, which loads OpenSSL: 3 ms of every start."""
    name = "_sha2" if sys.version_info >= (3, 12) else "_sha256"
    sha256: Callable[[bytes], hashlib._Hash] = __import__(name).sha256
    return sha256


def sandbox_of(annotations: "dict[str, str]", container_id: str) -> str:
    """The id of the sandbox that a container with these annotations belongs to: its own, unless it joins a pod."""
    for type_key, sandbox_key in POD_ANNOTATIONS:
        if type_key in annotations:
            return (
                annotations.get(sandbox_key, container_id)
                if annotations[type_key] == "container"
                else container_id
            )
    return container_id


def valid_id(value: str) -> bool:
    """Whether an id may become a directory name: containerd allows letters, digits and `-_.` inside."""
    return (
        0 < len(value) <= 255 and value not in (".", "..") and all(c.isalnum() or c in "-_." for c in value)
    )

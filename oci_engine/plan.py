"""All that the new process is to do, decided before it exists: plain data, and numbers of open files.

Between fork and exec nothing is looked up in the caller's objects, parsed, imported or logged.
"""

from __future__ import annotations

from oci_engine.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.linux_spec import Device
    from oci_engine.mount_options import MountOptions
    from oci_engine.spec import Hook, Rlimit, Scheduler


class MountStep(Record):
    """`tree` is a detached mount that the caller has opened, or -1: the source is opened by the new process."""

    destination: str
    type: str
    source: str
    options: MountOptions
    place: str
    tree: int = -1


class CgroupMount(Record):
    """A controller's name in the container, and the host's directory that is shown there."""

    name: str
    path: str
    aliases: tuple[str, ...] = ()


class RootPlan(Record):
    """The file system. `cgroup_mounts` has one entry with an empty name where cgroups are version 2."""

    path: str
    readonly: bool
    propagation: str
    no_pivot: bool
    mounts: tuple[MountStep, ...]
    devices: tuple[Device, ...]
    bind_devices: bool
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    cgroup_mounts: tuple[CgroupMount, ...]
    mount_label: str


class NamespacePlan(Record):
    """`joined` are open files of namespaces with their CLONE_NEW flag; `time_offsets` the lines for the kernel."""

    joined: tuple[tuple[int, int], ...]
    unshared: int
    time_offsets: str
    loopback: bool
    hostname: str
    domainname: str
    sysctl: tuple[tuple[str, str], ...]


class ProcessPlan(Record):
    """What is executed, and as whom. Capabilities are bit masks; `seccomp` is a program, or None."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    rlimits: tuple[Rlimit, ...]
    bounding: int
    effective: int
    inheritable: int
    permitted: int
    ambient: int
    last_capability: int
    no_new_privileges: bool
    seccomp: bytes | None
    seccomp_flags: int
    apparmor_profile: str
    selinux_label: str
    personality: int | None
    scheduler: Scheduler | None
    io_priority: int | None
    terminal: bool
    console_size: tuple[int, int] | None
    keyring: str


class Plan(Record):
    """`root` is None for one more process in a container, which has no `start_fifo`, and in a joined mount namespace.

    Files: -1 is none; `stdio` become 0, 1 and 2.
    """

    namespaces: NamespacePlan
    root: RootPlan | None
    process: ProcessPlan
    create_hooks: tuple[Hook, ...] = ()
    start_hooks: tuple[Hook, ...] = ()
    hook_state: str = ""
    wait_for_hooks: bool = False
    channel: int
    start_fifo: int = -1
    console_socket: int = -1
    stdio: tuple[int, int, int] = (0, 1, 2)
    preserved: tuple[int, ...] = ()

"""From a specification to a plan: everything that can be decided before the fork, and checked."""

from __future__ import annotations

import os

from oci_engine import capabilities, linux
from oci_engine.devices import with_defaults
from oci_engine.errors import SpecError, Unsupported
from oci_engine.mount_options import UNSUPPORTED, parse_options
from oci_engine.plan import MountStep, NamespacePlan, ProcessPlan, RootPlan
from oci_engine.records import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import CgroupMount
    from oci_engine.spec import Mount, Process, Spec

CLONE_FLAGS = {
    "user": linux.CLONE_NEWUSER, "cgroup": linux.CLONE_NEWCGROUP, "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS, "network": linux.CLONE_NEWNET, "pid": linux.CLONE_NEWPID,
    "time": linux.CLONE_NEWTIME, "mount": linux.CLONE_NEWNS,
}  # fmt: skip
#: As in /proc/PID/ns.
FILES = {
    "user": "user", "cgroup": "cgroup", "ipc": "ipc", "uts": "uts", "network": "net", "pid": "pid",
    "time": "time", "mount": "mnt",
}  # fmt: skip


def plan_process(process: Process, spec: Spec, *, seccomp: bytes | None, keyring: str) -> ProcessPlan:
    """Of a container's first process, or of one more. `seccomp` is the filter of the specification, as a program."""
    user = process.user
    # Without a word about capabilities there are none, which is the safe reading.
    sets = process.capabilities or dict.fromkeys(capabilities.SETS, 0)
    return ProcessPlan(
        args=process.args,
        env=process.env,
        cwd=process.cwd,
        uid=user.uid,
        gid=user.gid,
        groups=user.additional_gids,
        umask=0o022 if user.umask is None else user.umask,
        rlimits=process.rlimits,
        bounding=sets["bounding"],
        effective=sets["effective"],
        inheritable=sets["inheritable"],
        permitted=sets["permitted"],
        ambient=sets["ambient"],
        last_capability=capabilities.last_of_kernel(),
        no_new_privileges=process.no_new_privileges,
        seccomp=seccomp,
        seccomp_flags=spec.linux.seccomp.flags if spec.linux.seccomp else 0,
        apparmor_profile=process.apparmor_profile,
        selinux_label=process.selinux_label,
        personality=spec.linux.personality,
        scheduler=process.scheduler,
        io_priority=process.io_priority,
        terminal=process.terminal,
        console_size=process.console_size,
        keyring=keyring,
    )


def plan_root(
    spec: Spec,
    *,
    rootfs: str,
    bundle: str,
    no_pivot: bool,
    cgroup_mounts: tuple[CgroupMount, ...],
    bind_devices: bool,
) -> RootPlan:
    """`rootfs` is the absolute path. Raises SpecError, Unsupported."""
    return RootPlan(
        path=rootfs,
        readonly=spec.root.readonly,
        propagation=spec.linux.rootfs_propagation,
        no_pivot=no_pivot,
        mounts=tuple(
            plan_mount(mount, bundle, maps_users="user" in spec.linux.namespaces) for mount in spec.mounts
        ),
        devices=with_defaults(spec.linux.devices),
        bind_devices=bind_devices,
        masked_paths=spec.linux.masked_paths,
        readonly_paths=spec.linux.readonly_paths,
        cgroup_mounts=cgroup_mounts,
        mount_label=spec.linux.mount_label,
    )


def plan_mount(mount: Mount, bundle: str, *, maps_users: bool = False) -> MountStep:
    """Sources of binds are relative to the bundle. `maps_users`: the container has a user namespace."""
    try:
        options = parse_options(mount.options, kind=mount.type)
    except ValueError as err:
        assert str(err) in UNSUPPORTED
        raise Unsupported(f"{mount.place}.options", f"{err} is not supported") from None
    source = mount.source
    if options.bind:
        if not source and not options.remount:
            raise SpecError(f"{mount.place}.source", "is missing, and the mount is a bind")
        if options.data:
            raise SpecError(f"{mount.place}.options", f"{options.data[0]!r} has no meaning for a bind")
        if options.copy_up:
            raise SpecError(f"{mount.place}.options", "tmpcopyup is for tmpfs")
        source = os.path.join(bundle, source)
    elif options.copy_up and mount.type != "tmpfs":
        raise SpecError(f"{mount.place}.options", "tmpcopyup is for tmpfs")
    elif not mount.type and not options.remount:
        raise SpecError(f"{mount.place}.type", "is missing, and the mount is no bind")
    if mount.uid_mappings and not options.idmap:
        options = replace(options, idmap="idmap")
    if options.idmap:
        if not options.bind or options.remount:
            raise Unsupported(
                f"{mount.place}.options", "ids are mapped anew in binds alone, when they are made"
            )
        if not mount.uid_mappings and not maps_users:
            raise SpecError(
                f"{mount.place}.options",
                f"{options.idmap} needs uidMappings and gidMappings, of the mount or of a user namespace",
            )
    return MountStep(
        destination=mount.destination,
        type="bind" if options.bind else mount.type,
        source=source,
        options=options,
        place=mount.place,
    )


def plan_namespaces(spec: Spec, joined: tuple[tuple[int, int], ...]) -> NamespacePlan:
    """`joined` are the open files of those that the specification gives paths for."""
    kinds = spec.linux.namespaces
    unshared = 0
    for kind, path in kinds.items():
        if not path:
            unshared |= CLONE_FLAGS[kind]
    return NamespacePlan(
        joined=joined,
        unshared=unshared,
        time_offsets="".join(
            f"{clock} {seconds} {nanoseconds}\n"
            for clock, (seconds, nanoseconds) in spec.linux.time_offsets.items()
        ),
        loopback=kinds.get("network") == "",
        hostname=spec.hostname,
        domainname=spec.domainname,
        sysctl=tuple(spec.linux.sysctl.items()),
    )

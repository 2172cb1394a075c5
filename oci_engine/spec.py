"""The specification of a container, read and checked: version 1.0 to 1.3 of the OCI's runtime specification.

Reading fails with SpecError where the document is wrong, with Unsupported where it asks for something that this
engine does not do. Fields that the specification does not know are ignored, as it demands.
"""

from __future__ import annotations

import posixpath

from oci_engine import capabilities
from oci_engine.errors import SpecError, Unsupported
from oci_engine.linux_spec import IdMapping, Linux, read_linux, read_mapping
from oci_engine.reader import UINT32_MAX, UINT64_MAX, Reader
from oci_engine.records import Record

HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
#: Of asm-generic/resource.h, which all our architectures have.
RLIMITS = {
    f"RLIMIT_{name}": number
    for number, name in enumerate((
        "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING",
        "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
    ))
}  # fmt: skip
_SCHEDULERS = {
    "SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6,
}  # fmt: skip
_SCHEDULER_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 1, "SCHED_FLAG_RECLAIM": 2, "SCHED_FLAG_DL_OVERRUN": 4,
    "SCHED_FLAG_KEEP_POLICY": 8, "SCHED_FLAG_KEEP_PARAMS": 16, "SCHED_FLAG_UTIL_CLAMP_MIN": 32,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 64,
}  # fmt: skip
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}


class Root(Record):
    path: str
    readonly: bool


class Mount(Record):
    """`place` is where it stands in the document, for complaints that come later."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...]
    place: str
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()


class User(Record):
    uid: int
    gid: int
    umask: int | None
    additional_gids: tuple[int, ...]


class Rlimit(Record):
    name: str
    resource: int
    soft: int
    hard: int


class Scheduler(Record):
    """The words of struct sched_attr, in its order."""

    policy: int
    flags: int
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int


class Process(Record):
    """Capabilities are bit masks by the names of `capabilities.SETS`; None is none, for one more process the first's.

    CPUs are for one more process in a container: before it is in the container's group and from then on; empty leaves
    them alone.
    """

    terminal: bool
    console_size: tuple[int, int] | None  # rows, columns
    cwd: str
    env: tuple[str, ...]
    args: tuple[str, ...]
    user: User
    rlimits: tuple[Rlimit, ...]
    capabilities: dict[str, int] | None
    no_new_privileges: bool
    apparmor_profile: str
    selinux_label: str
    oom_score_adj: int | None
    scheduler: Scheduler | None
    io_priority: int | None
    unknown_capabilities: tuple[
        str, ...
    ]  # by their place; not granted, which the specification wants a warning for
    exec_cpus_initial: frozenset[int]
    exec_cpus_final: frozenset[int]


class Hook(Record):
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int | None


class Spec(Record):
    version: str
    root: Root
    mounts: tuple[Mount, ...]
    process: Process | None
    hostname: str
    domainname: str
    hooks: dict[str, tuple[Hook, ...]]
    annotations: dict[str, str]
    linux: Linux


def read_spec(document: object) -> Spec:
    """Raises SpecError, Unsupported."""
    reader = Reader(document)
    version = reader.text("ociVersion")
    if version.partition(".")[0] != "1":
        raise Unsupported("ociVersion", f"{version!r} is none of 1.0 to 1.3")
    reader.refuse(("vm",), "containers of virtual machines are not made here")
    root = reader.inner("root")
    process = read_process(reader.inner("process")) if reader.has("process") else None
    spec = Spec(
        version=version,
        root=Root(path=root.text("path"), readonly=root.flag("readonly")),
        mounts=reader.objects("mounts", _read_mount),
        process=process,
        hostname=reader.text("hostname", ""),
        domainname=reader.text("domainname", ""),
        hooks=_read_hooks(reader.inner("hooks")),
        annotations=reader.text_map("annotations"),
        linux=read_linux(reader.inner("linux")),
    )
    _check_namespaces(spec)
    return spec


def read_process(reader: Reader) -> Process:
    """Of a container's first process, or of one more. Raises SpecError, Unsupported."""
    reader.refuse(("commandLine",), "is for Windows")
    args = reader.texts("args")
    if not args:
        raise SpecError(reader.at("args"), "must name a program")
    cwd = reader.text("cwd")
    if not cwd.startswith("/"):
        raise SpecError(reader.at("cwd"), f"want an absolute path, got {cwd!r}")
    size = reader.inner("consoleSize")
    cpus = reader.inner("execCPUAffinity")
    given = reader.inner("capabilities") if reader.has("capabilities") else None
    return Process(
        terminal=reader.flag("terminal"),
        console_size=(
            (size.integer("height", 0, 0xFFFF), size.integer("width", 0, 0xFFFF))
            if reader.has("consoleSize")
            else None
        ),
        cwd=cwd,
        env=_read_env(reader),
        args=args,
        user=_read_user(reader.inner("user")),
        rlimits=_read_rlimits(reader),
        capabilities={name: _read_set(given, name) for name in capabilities.SETS} if given else None,
        unknown_capabilities=_unknown_capabilities(given) if given else (),
        no_new_privileges=reader.flag("noNewPrivileges"),
        apparmor_profile=reader.text("apparmorProfile", ""),
        selinux_label=reader.text("selinuxLabel", ""),
        oom_score_adj=reader.maybe_integer("oomScoreAdj", -1000, 1000),
        scheduler=_read_scheduler(reader.inner("scheduler")) if reader.has("scheduler") else None,
        io_priority=_read_io_priority(reader.inner("ioPriority")) if reader.has("ioPriority") else None,
        exec_cpus_initial=_read_cpus(cpus, "initial"),
        exec_cpus_final=_read_cpus(cpus, "final"),
    )


def _read_cpus(reader: Reader, name: str) -> frozenset[int]:
    """A list as the kernel has them: 0-3,7."""
    found: set[int] = set()
    text = reader.text(name, "")
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        numbers = (first, last if dash else first)
        if not all(each.isascii() and each.isdigit() and len(each) < 6 for each in numbers):
            raise SpecError(reader.at(name), f"want numbers and ranges as in 0-3,7, got {text!r}")
        found.update(range(int(numbers[0]), int(numbers[1]) + 1))
    if text and not found:
        raise SpecError(reader.at(name), f"has no CPU in it: {text!r}")
    return frozenset(found)


def _read_env(reader: Reader) -> tuple[str, ...]:
    entries = reader.texts("env")
    for index, entry in enumerate(entries):
        if entry.partition("=")[0] in ("", entry):
            raise SpecError(f"{reader.at('env')}[{index}]", f"want NAME=value, got {entry!r}")
    return entries


def _read_mount(reader: Reader) -> Mount:
    destination = reader.text("destination")
    if not destination:
        raise SpecError(reader.at("destination"), "is empty")
    uids, gids = (reader.objects(name, read_mapping) for name in ("uidMappings", "gidMappings"))
    if bool(uids) != bool(gids):
        raise SpecError(
            reader.at("gidMappings" if uids else "uidMappings"),
            "is missing, and the other one of the two is not",
        )
    return Mount(
        # Paths that are not absolute were allowed by 1.0, and mean the same.
        destination=posixpath.normpath("/" + destination.lstrip("/")),
        type=reader.text("type", ""),
        source=reader.text("source", ""),
        options=reader.texts("options"),
        place=reader.place,
        uid_mappings=uids,
        gid_mappings=gids,
    )


def _read_user(reader: Reader) -> User:
    reader.refuse(("username",), "is for Windows; give uid and gid")
    return User(
        uid=reader.integer("uid", 0, UINT32_MAX, 0),
        gid=reader.integer("gid", 0, UINT32_MAX, 0),
        umask=reader.maybe_integer("umask", 0, 0o777),
        additional_gids=reader.integers("additionalGids", 0, UINT32_MAX),
    )


def _read_rlimits(reader: Reader) -> tuple[Rlimit, ...]:
    seen: set[str] = set()

    def read(each: Reader) -> Rlimit:
        name = each.choice("type", RLIMITS)
        if name in seen:
            raise SpecError(each.at("type"), f"{name} is given twice")
        seen.add(name)
        soft, hard = (each.integer(limit, 0, UINT64_MAX) for limit in ("soft", "hard"))
        if soft > hard:
            raise SpecError(each.at("soft"), f"{soft} is above the hard limit {hard}")
        return Rlimit(name=name, resource=RLIMITS[name], soft=soft, hard=hard)

    return reader.objects("rlimits", read)


def _read_set(reader: Reader, name: str) -> int:
    return capabilities.bits(tuple(each for each in reader.texts(name) if capabilities.is_known(each)))


def _unknown_capabilities(reader: Reader) -> tuple[str, ...]:
    return tuple(
        f"{reader.at(name)}[{index}]: {each!r} is not a capability that is known here, and is not granted"
        for name in capabilities.SETS
        for index, each in enumerate(reader.texts(name))
        if not capabilities.is_known(each)
    )


def _read_scheduler(reader: Reader) -> Scheduler:
    flags = 0
    for index, name in enumerate(reader.texts("flags")):
        if name not in _SCHEDULER_FLAGS:
            raise SpecError(f"{reader.at('flags')}[{index}]", f"{name!r} is no flag of a scheduler")
        flags |= _SCHEDULER_FLAGS[name]
    return Scheduler(
        policy=_SCHEDULERS[reader.choice("policy", _SCHEDULERS)],
        flags=flags,
        nice=reader.integer("nice", -20, 19, 0),
        priority=reader.integer("priority", 0, 99, 0),
        runtime=reader.integer("runtime", 0, UINT64_MAX, 0),
        deadline=reader.integer("deadline", 0, UINT64_MAX, 0),
        period=reader.integer("period", 0, UINT64_MAX, 0),
    )


def _read_io_priority(reader: Reader) -> int:
    """As ioprio_set(2) takes it: the class above bit 13, the level below."""
    return _IO_CLASSES[reader.choice("class", _IO_CLASSES)] << 13 | reader.integer("priority", 0, 7, 0)


def _read_hooks(reader: Reader) -> dict[str, tuple[Hook, ...]]:
    def read(each: Reader) -> Hook:
        path = each.text("path")
        if not path.startswith("/"):
            raise SpecError(each.at("path"), f"want an absolute path, got {path!r}")
        return Hook(
            path=path,
            args=each.texts("args"),
            env=_read_env(each),
            timeout_s=each.maybe_integer("timeout", 1, UINT32_MAX),
        )

    return {kind: reader.objects(kind, read) for kind in HOOKS}


def _check_namespaces(spec: Spec) -> None:
    """What only makes sense, or is only safe, in a namespace of the container's own."""
    kinds = spec.linux.namespaces
    if "mount" not in kinds:
        raise Unsupported("linux.namespaces", "a container without a mount namespace is not made here")
    if kinds["mount"]:
        _check_joined_mounts(spec)
    for name, value in (("hostname", spec.hostname), ("domainname", spec.domainname)):
        if value and "uts" not in kinds:
            raise SpecError(name, "would be the host's: the container has no UTS namespace")
    mapped = bool(spec.linux.uid_mappings or spec.linux.gid_mappings)
    if mapped and "user" not in kinds:
        raise SpecError("linux.uidMappings", "the container has no user namespace")
    if kinds.get("user") == "" and not (spec.linux.uid_mappings and spec.linux.gid_mappings):
        raise SpecError("linux.uidMappings", "a new user namespace needs uidMappings and gidMappings")
    for name, mappings in (
        ("uidMappings", spec.linux.uid_mappings),
        ("gidMappings", spec.linux.gid_mappings),
    ):
        if mappings and not any(each.container == 0 for each in mappings):
            raise Unsupported(f"linux.{name}", "id 0 of the container, which sets it up, is not mapped")
    if spec.linux.time_offsets and kinds.get("time") != "":
        raise SpecError("linux.timeOffsets", "only a new time namespace can be given offsets")
    if spec.linux.net_devices and "network" not in kinds:
        raise SpecError("linux.netDevices", "the container has no network namespace")
    for key in spec.linux.sysctl:
        needed = sysctl_namespace(key)
        if needed is None:
            raise SpecError(f"linux.sysctl[{key!r}]", "belongs to no namespace and would be the host's")
        if needed not in kinds:
            raise SpecError(f"linux.sysctl[{key!r}]", f"the container has no {needed} namespace")


def _check_joined_mounts(spec: Spec) -> None:
    """A mount namespace that is joined stays as it is: its other processes would see every change."""
    linux = spec.linux
    changes = {
        "root.readonly": spec.root.readonly, "mounts": spec.mounts, "linux.devices": linux.devices,
        "linux.maskedPaths": linux.masked_paths, "linux.readonlyPaths": linux.readonly_paths,
        "linux.rootfsPropagation": linux.rootfs_propagation,
    }  # fmt: skip
    for place, wanted in changes.items():
        if wanted:
            raise SpecError(place, "would change the mount namespace that the container joins; leave it out")


_IPC_SYSCTLS = frozenset(
    f"kernel.{name}"
    for name in (
        "msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced", "msg_next_id",
        "sem_next_id", "shm_next_id",
    )
)  # fmt: skip


def sysctl_namespace(key: str) -> str | None:
    """The namespace that a sysctl belongs to; None for those of the whole machine."""
    dotted = key.replace("/", ".")
    if dotted in _IPC_SYSCTLS or dotted.startswith("fs.mqueue."):
        return "ipc"
    if dotted.startswith("net."):
        return "network"
    if dotted == "kernel.domainname":
        return "uts"
    if dotted.startswith("user."):
        return "user"
    return None

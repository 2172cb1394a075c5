"""The part of the specification that is Linux's: namespaces, devices, resources, seccomp, paths to hide."""

from __future__ import annotations

from oci_engine.errors import SpecError
from oci_engine.reader import INT64_MAX, UINT32_MAX
from oci_engine.records import Record
from oci_engine.resources_spec import Resources, read_resources
from oci_engine.seccomp import Seccomp, read_seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.reader import Reader

NAMESPACES = ("user", "cgroup", "ipc", "uts", "network", "pid", "time", "mount")
PROPAGATIONS = ("private", "shared", "slave", "unbindable", "rprivate", "rshared", "rslave", "runbindable")
#: Bytes, as the kernel has it.
_INTERFACE_NAME = 15
_PERSONALITIES = {"LINUX": 0, "LINUX32": 8}


class IdMapping(Record):
    container: int
    host: int
    size: int


class Device(Record):
    """A file to make. `type` is c, b or p."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


class Linux(Record):
    """`namespaces` has the path to join for each kind, empty for a new one; kinds that are not in it stay shared."""

    namespaces: dict[str, str]
    uid_mappings: tuple[IdMapping, ...]
    gid_mappings: tuple[IdMapping, ...]
    time_offsets: dict[str, tuple[int, int]]  # seconds, nanoseconds
    devices: tuple[Device, ...]
    cgroups_path: str
    resources: Resources
    rootfs_propagation: str
    seccomp: Seccomp | None
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    mount_label: str
    sysctl: dict[str, str]
    personality: int | None
    net_devices: tuple[tuple[str, str], ...]  # the name outside, and inside


def read_linux(reader: Reader) -> Linux:
    reader.refuse(("intelRdt",), "Intel's resource control is not supported")
    reader.refuse(("memoryPolicy",), "is not supported")
    persona = reader.inner("personality")
    persona.refuse(("flags",), "flags of personalities are not supported")
    return Linux(
        namespaces=_read_namespaces(reader),
        uid_mappings=reader.objects("uidMappings", read_mapping),
        gid_mappings=reader.objects("gidMappings", read_mapping),
        time_offsets=_read_time_offsets(reader.inner("timeOffsets")),
        devices=reader.objects("devices", _read_device),
        cgroups_path=_read_cgroups_path(reader),
        resources=read_resources(reader.inner("resources")),
        rootfs_propagation=reader.choice("rootfsPropagation", PROPAGATIONS, ""),
        seccomp=read_seccomp(reader.inner("seccomp")) if reader.has("seccomp") else None,
        masked_paths=_read_paths(reader, "maskedPaths"),
        readonly_paths=_read_paths(reader, "readonlyPaths"),
        mount_label=reader.text("mountLabel", ""),
        sysctl=reader.text_map("sysctl"),
        personality=_PERSONALITIES[persona.choice("domain", _PERSONALITIES)]
        if reader.has("personality")
        else None,
        net_devices=_read_net_devices(reader.inner("netDevices")),
    )


def _read_net_devices(reader: Reader) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for name in reader.names():
        inside = reader.inner(name).text("name", "") or name
        for each in (name, inside):
            if (
                not 0 < len(each.encode()) <= _INTERFACE_NAME
                or each in (".", "..")
                or set(each) & set("/: \t\n")
            ):
                raise SpecError(reader.at(name), f"{each!r} is no name of an interface")
        if inside in (each for _, each in found):
            raise SpecError(reader.at(name), f"two interfaces are to be called {inside!r}")
        found.append((name, inside))
    return tuple(found)


def _read_namespaces(reader: Reader) -> dict[str, str]:
    found: dict[str, str] = {}

    def read(each: Reader) -> None:
        kind, path = each.choice("type", NAMESPACES), each.text("path", "")
        if kind in found:
            raise SpecError(each.at("type"), f"{kind} is given twice")
        if path and not path.startswith("/"):
            raise SpecError(each.at("path"), f"want an absolute path, got {path!r}")
        found[kind] = path

    reader.objects("namespaces", read)
    return found


def read_mapping(reader: Reader) -> IdMapping:
    return IdMapping(
        container=reader.integer("containerID", 0, UINT32_MAX),
        host=reader.integer("hostID", 0, UINT32_MAX),
        size=reader.integer("size", 1, UINT32_MAX),
    )


def _read_time_offsets(reader: Reader) -> dict[str, tuple[int, int]]:
    found = {}
    for clock in reader.names():
        if clock not in ("monotonic", "boottime"):
            raise SpecError(reader.at(clock), "want monotonic or boottime")
        offset = reader.inner(clock)
        found[clock] = (
            offset.integer("secs", -INT64_MAX, INT64_MAX, 0), offset.integer("nanosecs", 0, 999_999_999, 0),
        )  # fmt: skip
    return found


def _read_device(reader: Reader) -> Device:
    kind = reader.choice("type", ("c", "b", "u", "p"))
    needs_number = kind != "p"
    path = reader.text("path")
    if not path.startswith("/"):
        raise SpecError(reader.at("path"), f"want an absolute path, got {path!r}")
    return Device(
        path=path,
        type="c" if kind == "u" else kind,
        # Twelve bits and twenty, as the kernel has them.
        major=reader.integer("major", 0, 0xFFF, None if needs_number else 0),
        minor=reader.integer("minor", 0, 0xFFFFF, None if needs_number else 0),
        mode=reader.integer("fileMode", 0, UINT32_MAX, 0o666) & 0o7777,
        uid=reader.integer("uid", 0, UINT32_MAX, 0),
        gid=reader.integer("gid", 0, UINT32_MAX, 0),
    )


def _read_cgroups_path(reader: Reader) -> str:
    path = reader.text("cgroupsPath", "")
    if path and not path.strip("/."):
        raise SpecError(reader.at("cgroupsPath"), f"{path!r} is the group of the whole host")
    if ".." in path.split("/"):
        raise SpecError(reader.at("cgroupsPath"), f"must not lead upwards: {path!r}")
    return path


def _read_paths(reader: Reader, name: str) -> tuple[str, ...]:
    paths = reader.texts(name)
    for index, path in enumerate(paths):
        if not path.startswith("/"):
            raise SpecError(f"{reader.at(name)}[{index}]", f"want an absolute path, got {path!r}")
    return paths

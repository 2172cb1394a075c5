"""The limits of a container, out of `linux.resources`."""

from __future__ import annotations

from oci_engine.errors import SpecError
from oci_engine.reader import INT64_MAX, UINT32_MAX, UINT64_MAX
from oci_engine.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.reader import Reader

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")
_LETTERS = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LIST = frozenset("0123456789,- ")
#: Of cgroup v2, what decides over processes and is the engine's.
_NOT_UNIFIED = ("cgroup.",)


class DeviceRule(Record):
    """`type` is a, b or c; None as a number is any of them."""

    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


class Memory(Record):
    """Bytes; -1 is no limit."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool = False
    check_before_update: bool = False


class Cpu(Record):
    """Quota, period and burst in microseconds."""

    shares: int | None = None
    quota: int | None = None
    burst: int | None = None
    period: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    cpus: str = ""
    mems: str = ""
    idle: int | None = None


class Throttle(Record):
    """`file` is the v1 controller's: read_bps_device and so on."""

    file: str
    major: int
    minor: int
    rate: int


class DeviceWeight(Record):
    """Of one disk, 10 to 1000."""

    major: int
    minor: int
    weight: int | None
    leaf_weight: int | None


class Rdma(Record):
    """None is no limit."""

    device: str
    handles: int | None
    objects: int | None

    @property
    def line(self) -> str:
        """As rdma.max takes it, in both versions of control groups."""
        handles, objects = ("max" if each is None else each for each in (self.handles, self.objects))
        return f"{self.device} hca_handle={handles} hca_object={objects}"


class Resources(Record):
    devices: tuple[DeviceRule, ...] = ()
    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    pids_limit: int | None = None
    block_weight: int | None = None
    block_leaf_weight: int | None = None
    block_weights: tuple[DeviceWeight, ...] = ()
    throttles: tuple[Throttle, ...] = ()
    hugepages: tuple[tuple[str, int], ...] = ()  # page size as in 2MB, bytes
    unified: tuple[tuple[str, str], ...] = ()
    rdma: tuple[Rdma, ...] = ()


def read_resources(reader: Reader) -> Resources:
    reader.refuse(("network",), "limits of network classes are not supported")
    memory, cpu, block = reader.inner("memory"), reader.inner("cpu"), reader.inner("blockIO")
    pids = reader.inner("pids")
    return Resources(
        devices=reader.objects("devices", _read_rule),
        memory=Memory(
            limit=memory.maybe_integer("limit", -1, INT64_MAX),
            reservation=memory.maybe_integer("reservation", -1, INT64_MAX),
            swap=memory.maybe_integer("swap", -1, INT64_MAX),
            # Limits of kernel memory are gone from kernels, and the specification says to ignore them.
            swappiness=memory.maybe_integer("swappiness", 0, 100),
            disable_oom_killer=memory.flag("disableOOMKiller"),
            check_before_update=memory.flag("checkBeforeUpdate"),
        ),
        cpu=Cpu(
            shares=cpu.maybe_integer("shares", 0, UINT64_MAX),
            quota=cpu.maybe_integer("quota", -INT64_MAX, INT64_MAX),
            burst=cpu.maybe_integer("burst", 0, UINT64_MAX),
            period=cpu.maybe_integer("period", 0, UINT64_MAX),
            realtime_runtime=cpu.maybe_integer("realtimeRuntime", -INT64_MAX, INT64_MAX),
            realtime_period=cpu.maybe_integer("realtimePeriod", 0, UINT64_MAX),
            cpus=_read_list(cpu, "cpus"),
            mems=_read_list(cpu, "mems"),
            idle=cpu.maybe_integer("idle", 0, 1),
        ),
        pids_limit=pids.maybe_integer("limit", -INT64_MAX, INT64_MAX),
        block_weight=block.maybe_integer("weight", 0, 1000),
        block_leaf_weight=block.maybe_integer("leafWeight", 0, 1000),
        block_weights=block.objects("weightDevice", _read_weight),
        throttles=tuple(
            each
            for key, file in (
                ("throttleReadBpsDevice", "read_bps_device"), ("throttleWriteBpsDevice", "write_bps_device"),
                ("throttleReadIOPSDevice", "read_iops_device"), ("throttleWriteIOPSDevice", "write_iops_device"),
            )
            for each in block.objects(key, lambda entry, file=file: _read_throttle(entry, file))  # type: ignore[misc]
        ),
        hugepages=reader.objects("hugepageLimits", _read_hugepages),
        unified=_read_unified(reader),
        rdma=_read_rdma(reader.inner("rdma")),
    )  # fmt: skip


def _read_rule(reader: Reader) -> DeviceRule:
    major, minor = (reader.maybe_integer(name, -1, UINT32_MAX) for name in ("major", "minor"))
    access = reader.text("access", "") or "rwm"
    if set(access) - set("rwm"):
        raise SpecError(reader.at("access"), f"want letters of rwm, got {access!r}")
    kind = reader.choice("type", ("a", "b", "c"), "") or "a"
    return DeviceRule(
        allow=reader.flag("allow"),
        type=kind,
        major=None if major == -1 else major,
        minor=None if minor == -1 else minor,
        access=access,
    )


def _read_list(reader: Reader, name: str) -> str:
    value = reader.text(name, "")
    if not _LIST.issuperset(value):
        raise SpecError(reader.at(name), f"want numbers and ranges as in 0-3,7, got {value!r}")
    return value


def _read_weight(reader: Reader) -> DeviceWeight:
    found = DeviceWeight(
        major=reader.integer("major", 0, UINT32_MAX),
        minor=reader.integer("minor", 0, UINT32_MAX),
        weight=reader.maybe_integer("weight", 0, 1000),
        leaf_weight=reader.maybe_integer("leafWeight", 0, 1000),
    )
    if found.weight is None and found.leaf_weight is None:
        raise SpecError(reader.at("weight"), "is missing, and so is leafWeight: one of them is needed")
    return found


def _read_rdma(reader: Reader) -> tuple[Rdma, ...]:
    found = []
    for device in reader.names():
        if not device or any(letter.isspace() for letter in device):
            raise SpecError(reader.at(device), "is no name of a device")
        limits = reader.inner(device)
        handles, objects = (
            limits.maybe_integer(name, 0, UINT32_MAX) for name in ("hcaHandles", "hcaObjects")
        )
        if handles is None and objects is None:
            raise SpecError(
                limits.at("hcaHandles"), "is missing, and so is hcaObjects: one of them is needed"
            )
        found.append(Rdma(device=device, handles=handles, objects=objects))
    return tuple(found)


def _read_throttle(reader: Reader, file: str) -> Throttle:
    return Throttle(
        file=file,
        major=reader.integer("major", 0, UINT32_MAX),
        minor=reader.integer("minor", 0, UINT32_MAX),
        rate=reader.integer("rate", 0, UINT64_MAX),
    )


def _read_hugepages(reader: Reader) -> tuple[str, int]:
    size = reader.text("pageSize")
    number, unit = size[:-2], size[-2:]
    if not (number.isascii() and number.isdigit() and number[0] != "0" and unit in ("KB", "MB", "GB")):
        raise SpecError(reader.at("pageSize"), f"want a size as in 2MB, got {size!r}")
    return size, reader.integer("limit", 0, UINT64_MAX)


def _read_unified(reader: Reader) -> tuple[tuple[str, str], ...]:
    entries = reader.text_map("unified")
    for name in entries:
        if not _is_file_name(name) or name.startswith(_NOT_UNIFIED):
            raise SpecError(f"{reader.at('unified')}[{name!r}]", "is no controller's file")
    return tuple(entries.items())


def _is_file_name(name: str) -> bool:
    """The controller, a point, and more words with points between them."""
    controller, *words = name.split(".")
    return bool(
        controller and words and _LOWER.issuperset(controller)
        and all(word and _LETTERS.issuperset(word) for word in words)
    )  # fmt: skip

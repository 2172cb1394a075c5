"""The bundle directory as a type: what the shim itself needs of `config.json`, and the whole of it for the guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from shim import paths
from shim.errors import InvalidRequest


class Namespace(msgspec.Struct, frozen=True):
    """One entry of `linux.namespaces`; an empty path asks for a new one."""

    type: str
    path: str = ""


class Cpu(msgspec.Struct, frozen=True):
    """`linux.resources.cpu`, in microseconds."""

    quota: int = 0
    period: int = 0


class Memory(msgspec.Struct, frozen=True):
    """`linux.resources.memory`, in bytes."""

    limit: int = 0


class DeviceRule(msgspec.Struct, frozen=True):
    """One entry of `linux.resources.devices`; without numbers it is about all devices of its type."""

    allow: bool = False
    type: str = ""
    major: int = 0
    minor: int = 0


class Resources(msgspec.Struct, frozen=True):
    """The part of `linux.resources` that says how large a VM has to be, and which devices are meant."""

    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    devices: tuple[DeviceRule, ...] = ()


class Device(msgspec.Struct, frozen=True):
    """One entry of `linux.devices`."""

    path: str


class Linux(msgspec.Struct, frozen=True):
    """The part of `linux` that decides how the VM is built."""

    namespaces: tuple[Namespace, ...] = ()
    resources: Resources = Resources()
    devices: tuple[Device, ...] = ()
    cgroups_path: str = msgspec.field(default="", name="cgroupsPath")


class Mount(msgspec.Struct, frozen=True):
    """One entry of `mounts`."""

    destination: str
    source: str = ""
    type: str = ""
    options: tuple[str, ...] | None = None


class Root(msgspec.Struct, frozen=True):
    """`root`: where the container's file system is, relative to the bundle."""

    path: str = "rootfs"
    readonly: bool = False


class Hook(msgspec.Struct, frozen=True):
    """One hook: `args` begin with the program's own name, `env` is `NAME=value`, `timeout` seconds."""

    path: str
    args: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    timeout: int | None = None


class Hooks(msgspec.Struct, frozen=True, rename="camel"):
    """The hooks that run on the host."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


class Spec(msgspec.Struct, frozen=True):
    """What the shim itself reads of an OCI runtime spec (config.md of runtime-spec 1.0 to 1.2)."""

    hostname: str = ""
    annotations: dict[str, str] = {}
    mounts: tuple[Mount, ...] = ()
    root: Root = Root()
    linux: Linux = Linux()
    hooks: Hooks = Hooks()

    @property
    def netns(self) -> Path | None:
        """The network namespace that the pod was given, None for "make a new one" or "the host's"."""
        for namespace in self.linux.namespaces:
            if namespace.type == "network" and namespace.path and not namespace.path.startswith("/proc/0/"):
                return Path(namespace.path)
        return None

    @property
    def host_devices(self) -> tuple[Device, ...]:
        """The host's devices that the container is to have. For privileged ones, which have all devices of the machine
        that they run on, none of these stands for something."""
        about_all = [
            rule
            for rule in self.linux.resources.devices
            if rule.type in ("", "a") and max(rule.major, rule.minor) <= 0
        ]
        return () if about_all and about_all[-1].allow else self.linux.devices


class Bundle:
    """A container's bundle: its directory, its spec typed for the shim, and the raw JSON for the guest."""

    def __init__(self, container_id: str, path: Path, spec: Spec, raw: dict[str, Any]) -> None:
        self.container_id = container_id
        self.path = path
        self.spec = spec
        self.raw = raw

    @classmethod
    def load(cls, container_id: str, path: Path) -> Bundle:
        """Read the bundle.

        Raises:
            InvalidRequest: `config.json` is missing, not JSON, or not an OCI spec; says where.
        """
        file = path / "config.json"
        try:
            text = file.read_bytes()
            raw = msgspec.json.decode(text, type=dict[str, Any])
            spec = msgspec.convert(
                _without_nulls({name: raw.get(name) for name in Spec.__struct_fields__}), Spec
            )
        except OSError as err:
            raise InvalidRequest(
                f"cannot read the bundle of container {container_id}: {file}: {err.strerror}"
            ) from err
        except msgspec.MsgspecError as err:
            raise InvalidRequest(
                f"bundle of container {container_id}: {file} is not an OCI runtime spec: {err}"
            ) from err
        return cls(container_id, path, spec, raw)

    @property
    def sandbox_id(self) -> str:
        """The sandbox that the container belongs to; its own id when it is one."""
        return paths.sandbox_of(self.spec.annotations, self.container_id)

    @property
    def rootfs(self) -> Path:
        """The container's file system on the host, when containerd passes no mounts for it."""
        return self.path / self.spec.root.path


def _without_nulls(value: Any) -> Any:
    """null stands for "absent" in what Go programs write; msgspec is strict about it."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value

"""What a valid configuration is: every key with its type, default, bounds, meaning and effect.

Attribute names are the names of the keys. The classes are plain data; `config.load` fills them and
`config.validate` adjusts the result.
"""

from collections.abc import Mapping
from types import MappingProxyType

from config.schema.agent import Agent, MemAgent
from config.schema.hypervisor import GuestExtensionImage, Qemu, QemuFactory, RootlessUser
from config.schema.key import Effect, KeyInfo, Section, annotation, info
from config.schema.runtime import Factory, Runtime, SharedMount

__all__ = [
    "ANNOTATION_PREFIX",
    "SECTIONS",
    "Agent",
    "Config",
    "Effect",
    "Factory",
    "GuestExtensionImage",
    "KeyInfo",
    "MemAgent",
    "Qemu",
    "QemuFactory",
    "RootlessUser",
    "Runtime",
    "Section",
    "SharedMount",
    "annotation",
    "info",
]


ANNOTATION_PREFIX = "io.katacontainers."
"""What all annotations begin with that concern the configuration."""


class Config(Section, frozen=True):
    """A complete configuration: the sections that the names in `[runtime]` chose."""

    runtime: Runtime = Runtime()
    hypervisor: Qemu = Qemu()
    agent: Agent = Agent()
    factory: Factory = Factory()


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "hypervisor.qemu": Qemu,
        "hypervisor.qemu.factory": QemuFactory,
        "hypervisor.qemu.guest_extension_images": GuestExtensionImage,
        "hypervisor.qemu.rootless_user": RootlessUser,
        "agent.kata": Agent,
        "agent.kata.mem_agent": MemAgent,
        "runtime": Runtime,
        "runtime.shared_mounts": SharedMount,
        "factory": Factory,
    }
)
"""Every section by its dotted name, in the order of the reference."""

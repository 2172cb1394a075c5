"""The effective configuration, key by key, each with its origin: for people, and for a sandbox's own record of it."""

from collections.abc import Iterator
from typing import Any

import msgspec

from config.load import LoadedConfig
from config.schema import Section
from config.tree import KeyPath, dotted

DEFAULT = "default"


class Setting(msgspec.Struct, frozen=True):
    """One key's value after all adjustments, and what set it: `default`, a file, or an annotation."""

    key: str
    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.key} = {msgspec.json.encode(self.value).decode()}  # {self.origin}"


def settings(loaded: LoadedConfig) -> list[Setting]:
    """Every key of the sections in use, in the order of the schema."""
    config = loaded.config
    sections: tuple[tuple[KeyPath, Section], ...] = (
        (("runtime",), config.runtime),
        (("hypervisor", config.runtime.hypervisor_name), config.hypervisor),
        (("agent", config.runtime.agent_name), config.agent),
        (("factory",), config.factory),
    )
    return [
        Setting(dotted(where), msgspec.to_builtins(value), loaded.origins.get(dotted(where), DEFAULT))
        for header, section in sections
        for where, value in _keys(section, header)
    ]


def encode(loaded: LoadedConfig) -> bytes:
    """The settings as JSON: an array of objects with `key`, `value` and `origin`."""
    return msgspec.json.encode(settings(loaded))


def decode(text: bytes) -> list[Setting]:
    """The other way round. Raises `msgspec.MsgspecError` when it is something else."""
    return msgspec.json.decode(text, type=list[Setting])


def _keys(section: Section, where: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _keys(value, (*where, name))
        else:
            yield (*where, name), value

"""The schema knows every key of Kata, with its type and default, and says something about each."""

import csv
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest
from msgspec.structs import FieldInfo, fields

from config.describe import unwrap, wanted
from config.schema import SECTIONS, Config, Section, info

ROOT = Path(__file__).resolve().parents[3]
KEYS = Path(__file__).parent / "data" / "kata_keys.tsv"

# Where kata-py's default is not Kata's, and what it is instead.
OWN_DEFAULTS = {
    "hypervisor.qemu.kernel": "/usr/share/kata-py/vmlinux",
    "hypervisor.qemu.default_memory": 2048,
    "hypervisor.qemu.selinux_label": "",
    "hypervisor.qemu.seccomp_sandbox": "",
    "hypervisor.qemu.disable_nested_virtualization": False,
    "runtime.jaeger_endpoint": "",
    "agent.kata.health_check_request_timeout_ms": 5000,
}
OWN_KEYS = {
    "hypervisor.qemu.accel",
    "hypervisor.qemu.enable_numa",  # of Kata's Go runtime, as is the next
    "hypervisor.qemu.numa_mapping",
    "hypervisor.qemu.image_initrd",
    "hypervisor.qemu.vsock",
    "hypervisor.qemu.qmp_read_timeout_ms",
    "hypervisor.qemu.qmp_connect_timeout_ms",
    "hypervisor.qemu.qmp_retry_pause_ms",
    "hypervisor.qemu.boot_timeout_s",
    "hypervisor.qemu.guest_dir",
    "runtime.proxy_host_sockets",
    "agent.kata.server_addr",
    "agent.kata.mem_agent.enable",
    "agent.kata.mem_agent.create_container_timeout",
}


def kata_keys() -> list[dict[str, str]]:
    lines = KEYS.read_text().splitlines()[1:]
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def field_of(section: str, key: str) -> FieldInfo:
    return next(field for field in fields(SECTIONS[section]) if field.name == key)


def declared() -> list[tuple[str, FieldInfo]]:
    return [
        (header, field)
        for header, section in SECTIONS.items()
        for field in fields(section)
        if not isinstance(field.default, Section)
    ]


def type_word(kind: Any) -> str:
    """A field's type in the words of the key list."""
    inner = unwrap(kind)[0]
    if get_origin(inner) is tuple:
        return f"{type_word(get_args(inner)[0])}[]"
    inner = type(get_args(inner)[0]) if get_args(inner) else inner
    return {str: "string", int: "int", float: "float", bool: "bool"}[inner]


@pytest.mark.parametrize("row", kata_keys(), ids=lambda row: f"{row['section']}.{row['key']}")
def test_every_key_of_kata_is_declared(row: dict[str, str]) -> None:
    field = field_of(row["section"], row["key"])
    assert type_word(field.type) == row["type"]
    dotted = f"{row['section']}.{row['key']}"
    if dotted in OWN_DEFAULTS:
        assert field.default == OWN_DEFAULTS[dotted]
    elif row["default"] == "required":
        assert field.required
    elif row["default"].startswith("unset"):
        assert field.default is None
    elif row["type"] == "string":
        assert field.default == row["default"].strip('"')
    else:
        assert (
            list(field.default) == []
            if row["default"] == "[]"
            else field.default == msgspec.json.decode(row["default"])
        )


def test_nothing_else_is_declared_but_our_own_keys() -> None:
    kata = {f"{row['section']}.{row['key']}" for row in kata_keys()}
    tables = {"hypervisor.qemu.guest_extension_images", "runtime.shared_mounts"}
    assert {f"{header}.{field.name}" for header, field in declared()} - kata == OWN_KEYS | tables


@pytest.mark.parametrize(("header", "field"), declared(), ids=lambda value: getattr(value, "name", value))
def test_every_key_is_described(header: str, field: FieldInfo) -> None:
    said = info(SECTIONS[header], field.name)
    assert said.description.endswith(".")
    assert said.effect in ("now", "warned", "ignored", "refused")
    assert bool(said.why) == (said.effect != "now")
    assert not said.why.endswith(".")
    assert wanted(field.type)


def test_defaults_are_valid_values() -> None:
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config()


def test_nothing_can_be_changed_after_loading() -> None:
    with pytest.raises(AttributeError):
        Config().hypervisor.kernel = "/other"  # type: ignore[misc]


def test_the_reference_is_up_to_date() -> None:
    spec = spec_from_file_location("config_reference", ROOT / "packaging" / "config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    generator = module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.reference() == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

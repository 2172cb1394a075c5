"""Every typed command, looked up in the monitors of real QEMUs: it exists, and takes what it is given."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from hypervisor.qemu.commands import reconnecting
from tests.unit.hypervisor.test_qemu_knows import PROGRAMS, ask, knowledge
from tests.unit.hypervisor.test_qmp_commands import ANSWERED, PCI_COMMAND, SAID

# Their arguments are the properties of a type, which the schema does not have.
BY_TYPE = {"device_add": {"driver", "id"}}
SPOKEN = [(name, arguments) for _, name, arguments in SAID]
WITHOUT_ARGUMENTS = sorted({name for _, name, _, _ in ANSWERED} | {PCI_COMMAND})


class Schema:
    """What one QEMU says about its commands."""

    def __init__(self, program: str) -> None:
        (entries,) = ask(program, ("query-qmp-schema", {}))
        self.commands = {entry["name"]: entry for entry in entries if entry["meta-type"] == "command"}
        self._types = {entry["name"]: entry for entry in entries if entry["meta-type"] != "command"}

    def check(self, type_name: str, value: Any, where: str) -> None:
        """Every member of a value is one of the type, down to the innermost."""
        kind = self._types[type_name]
        if kind["meta-type"] == "alternate" and isinstance(value, dict):
            choices = [self._types[member["type"]] for member in kind["members"]]
            (kind,) = [choice for choice in choices if choice["meta-type"] == "object"]
        if kind["meta-type"] == "array" and isinstance(value, list):
            for item in value:
                self.check(kind["element-type"], item, where)
        if kind["meta-type"] != "object" or not isinstance(value, dict):
            return
        members = self._members(kind, value)
        for name, inner in value.items():
            assert name in members, f"{where}: no {name} in {sorted(members)}"
            self.check(members[name], inner, f"{where}.{name}")

    def _members(self, kind: dict[str, Any], value: dict[str, Any]) -> dict[str, str]:
        members = {member["name"]: member["type"] for member in kind["members"]}
        for variant in kind.get("variants", ()):
            if variant["case"] == value.get(kind["tag"]):
                members |= self._members(self._types[variant["type"]], value)
        return members


schema = cache(Schema)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("program", [program for *_, program in PROGRAMS])
@pytest.mark.parametrize(("name", "arguments"), SPOKEN, ids=[name for name, _ in SPOKEN])
def test_what_is_said_is_understood(program: str, name: str, arguments: dict[str, Any]) -> None:
    known = schema(program)
    if "reconnect" in str(arguments):  # as it is said to another QEMU
        data = {"server": False, **reconnecting(knowledge(program).version, 5)}
        arguments = {**arguments, "backend": {"type": "socket", "data": data}}
    if name in BY_TYPE:
        assert BY_TYPE[name] <= arguments.keys()
        arguments = {key: arguments[key] for key in BY_TYPE[name]}
    known.check(known.commands[name]["arg-type"], arguments, name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("program", [program for *_, program in PROGRAMS])
@pytest.mark.parametrize("name", WITHOUT_ARGUMENTS)
def test_what_is_asked_exists(program: str, name: str) -> None:
    assert name in schema(program).commands

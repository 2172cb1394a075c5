"""Raw tables to typed sections, with every mistake reported.

The usual, correct table is decoded in one step. Only when that fails is it walked key by key, to find all
that is wrong and to keep what is right, so that later checks still have something to look at.
"""

from typing import Any, Literal, TypeVar, get_args, get_origin

from msgspec import Meta, ValidationError, convert
from msgspec.structs import fields

from config.describe import show, unwrap, wanted
from config.schema import SECTIONS, Agent, Config, Factory, Qemu, Runtime, Section, annotation
from config.tree import KeyPath, Report, Table, dotted

S = TypeVar("S", bound=Section)


def decode(table: Table, report: Report) -> Config:
    """Decode the sections that are in use; others of the same kind (`[hypervisor.clh]`) are not looked at.

    Whatever is wrong goes to `report` and has its built-in default in the result.
    """
    for name, value in table.items():
        if name not in Config.__struct_fields__ and not _is_section(value):
            report.add((name,), "unknown key", _advice(name, ()))
    runtime = _section(Runtime, table.get("runtime", {}), ("runtime",), report) or Runtime()
    return Config(
        runtime=runtime,
        hypervisor=_chosen(Qemu, table, "hypervisor", runtime.hypervisor_name, report),
        agent=_chosen(Agent, table, "agent", runtime.agent_name, report),
        factory=_section(Factory, table.get("factory", {}), ("factory",), report) or Factory(),
    )


def unread_sections(table: Table) -> list[str]:
    """Top-level tables that mean nothing to us, by their dotted names."""
    known = Config.__struct_fields__
    return [dotted((name,)) for name, value in table.items() if name not in known and _is_section(value)]


def _is_section(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _chosen(kind: type[S], table: Table, group_name: str, name: str, report: Report) -> S:
    """Decode the section that a `runtime.*_name` key chose among its kind."""
    group, where = table.get(group_name, {}), (group_name, name)
    if not isinstance(group, dict):
        report.add((group_name,), f"want a table, got {show(group)}")
        return kind()
    others = [other for other in group if other != name]
    for other in others:
        if not _is_section(group[other]):
            report.add((group_name, other), "unknown key", f"keys belong below [{group_name}.{name}]")
    if name in group:
        return _section(kind, group[name], where, report) or kind()
    if found := ", ".join(
        f"[{dotted((group_name, other))}]" for other in others if _is_section(group[other])
    ):
        choice: KeyPath = ("runtime", f"{group_name}_name")
        report.add(where, "this section is missing", f"found only {found}", also=(choice,))
    return kind()


def _section(kind: type[S], table: object, where: KeyPath, report: Report) -> S | None:
    """Decode one table; None, after a report, when there is nothing to keep of it."""
    try:
        return convert(table, kind)
    except ValidationError:
        if isinstance(table, dict):
            return _salvage(kind, table, where, report)
        report.add(where, f"want a table, got {show(table)}")
        return None


def _salvage(kind: type[S], table: Table, where: KeyPath, report: Report) -> S | None:
    good: dict[str, object] = {}
    for name, value in table.items():
        here = (*where, name)
        if name not in kind.__struct_fields__:
            report.add(here, "unknown key", _advice(name, where))
        elif not _means_default(annotation(kind, name), value):
            decoded = _value(annotation(kind, name), value, here, report)
            if decoded is not None:
                good[name] = decoded
    required = [field.name for field in fields(kind) if field.required]
    for name in required:
        if name not in table:
            report.add((*where, name), "this key is missing")
    return kind(**good) if good.keys() >= set(required) else None


def _value(field: Any, value: object, here: KeyPath, report: Report) -> object:
    """Decode one value; None, after a report, when it is wrong (TOML has no null of its own)."""
    inner, metas = unwrap(field)
    if isinstance(inner, type) and issubclass(inner, Section):
        return _section(inner, value, here, report)
    if get_origin(inner) is tuple and isinstance(value, list):
        item = get_args(inner)[0]
        items = [_value(item, entry, (*here, index), report) for index, entry in enumerate(value)]
        return tuple(entry for entry in items if entry is not None)
    try:
        decoded: object = convert(value, field)
    except ValidationError:
        hint = _hint(metas) if get_origin(inner) is Literal else ""
        report.add(here, f"want {wanted(field)}, got {show(value)}", hint)
        return None
    return decoded


def _means_default(field: Any, value: object) -> bool:
    """An empty string in a key with fixed choices means its default, as Kata has it."""
    return value == "" and get_origin(unwrap(field)[0]) is Literal


def _hint(metas: list[Meta]) -> str:
    return next((meta.extra["hint"] for meta in metas if meta.extra), "")


def _advice(name: str, where: KeyPath) -> str:
    """What the user may have meant by an unknown key: the section it belongs to, or a better spelling."""
    homes = [f"[{header}]" for header, kind in SECTIONS.items() if name in kind.__struct_fields__]
    if homes:
        return f"it belongs to {' or '.join(homes)}"
    kind = SECTIONS.get(".".join(part for part in where if isinstance(part, str)))
    if kind is None:
        return ""
    from difflib import get_close_matches  # only a broken file pays for this import

    close = get_close_matches(name, kind.__struct_fields__, n=1)
    return f"did you mean {close[0]}?" if close else ""

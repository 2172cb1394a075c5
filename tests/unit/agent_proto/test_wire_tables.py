"""Every message, field, number, type and service method against golden tables, one per .proto file.

The tables are what the peers speak: Kata's agent and containerd. A field that moves, changes its type or gets
lost breaks a peer without any error of ours, so a table changes only together with a peer.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(__file__).parent / "data"
TREES = {"agent_proto": "agent_proto", "shim_api": "shim/api"}
TABLES = sorted(DATA.glob("*/*.tsv"))

Row = tuple[str, str, str, str, str]
"""Kind, full name, number, type, label; `-` where a column has no meaning."""


@pytest.mark.parametrize("table", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_compiled_file_is_its_table(table: Path) -> None:
    package = TREES[table.parent.name].replace("/", ".")
    module = importlib.import_module(f"{package}.gen.{table.stem}_pb2")
    file = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    head, _columns, *lines = table.read_text().splitlines()

    assert head == f"# package={file.package} syntax={file.syntax}"
    # Sorted, because a table follows its peer's order of declarations and our files are grouped to be read.
    assert sorted(rows_of_file(file)) == sorted(tuple(line.split("\t")) for line in lines)


@pytest.mark.parametrize("tree", TREES)
def test_every_proto_has_a_table(tree: str) -> None:
    protos = {path.stem for path in (ROOT / TREES[tree] / "protos").glob("*.proto")}
    assert protos == {path.stem for path in TABLES if path.parent.name == tree}


def rows_of_file(file: FileDescriptorProto) -> Iterator[Row]:
    for service in file.service:
        for method in service.method:
            request = ("stream " if method.client_streaming else "") + method.input_type.lstrip(".")
            response = ("stream " if method.server_streaming else "") + method.output_type.lstrip(".")
            name = f"{file.package}.{service.name}/{method.name}"
            yield "service-method", name, "-", f"{request} -> {response}", "-"
    for message in file.message_type:
        yield from rows_of_message(file.package, message)
    for enum in file.enum_type:
        yield from rows_of_enum(file.package, enum)


def rows_of_message(scope: str, message: DescriptorProto) -> Iterator[Row]:
    full = f"{scope}.{message.name}"
    if not message.field:
        yield "message", full, "-", "-", "empty"
    for field in message.field:
        yield "field", f"{full}.{field.name}", str(field.number), *type_and_label(full, message, field)
    for reserved in message.reserved_range:
        for number in range(reserved.start, reserved.end):
            yield "reserved", full, str(number), "-", "-"
    for nested in message.nested_type:
        if not nested.options.map_entry:
            yield from rows_of_message(full, nested)
    for enum in message.enum_type:
        yield from rows_of_enum(full, enum)


def rows_of_enum(scope: str, enum: EnumDescriptorProto) -> Iterator[Row]:
    full = f"{scope}.{enum.name}"
    for value in enum.value:
        yield "enum-value", f"{full}.{value.name}", str(value.number), full, "-"


def type_and_label(full: str, message: DescriptorProto, field: FieldDescriptorProto) -> tuple[str, str]:
    maps = {f".{full}.{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    deprecated = " deprecated" if field.options.deprecated else ""
    if field.type_name in maps:
        key, value = maps[field.type_name].field
        return f"map<{type_name(key)},{type_name(value)}>", "map" + deprecated
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        label = "repeated"
    elif field.proto3_optional:
        label = "optional"
    elif field.HasField("oneof_index"):
        label = f"oneof {message.oneof_decl[field.oneof_index].name}"
    else:
        label = "singular"
    return type_name(field), label + deprecated


def type_name(field: FieldDescriptorProto) -> str:
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return field.type_name.lstrip(".") or scalar

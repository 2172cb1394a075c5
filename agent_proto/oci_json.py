"""OCI runtime specs between their two forms: JSON objects, as in `config.json`, and the agent's messages.

The names follow one rule: the message's field name with its leading capitals lowered (`OOMScoreAdj` is
`oomScoreAdj`, `UIDMappings` is `uidMappings`), with the exceptions below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

_EXCEPTIONS = {
    "grpc.Spec.Version": "ociVersion",
    "grpc.LinuxSyscall.errnoret": "errnoRet",
    "grpc.LinuxHugepageLimit.Pagesize": "pageSize",
}
# protobuf has no "absent" for numbers, strings and booleans: their zeros are left out of the JSON, except for these
# fields, where zero means something by itself, or which the JSON always has.
_ALWAYS = {
    "grpc.Spec": ("Version",),
    "grpc.Process": ("Terminal", "Args", "Cwd"),
    "grpc.User": ("UID", "GID"),
    "grpc.LinuxCapabilities": ("Bounding", "Effective", "Inheritable", "Permitted", "Ambient"),
    "grpc.POSIXRlimit": ("Hard", "Soft"),
    "grpc.Root": ("Readonly",),
    "grpc.LinuxIDMapping": ("HostID", "ContainerID", "Size"),
    "grpc.LinuxNamespace": ("Type",),
    "grpc.LinuxDevice": ("Path", "Type", "Major", "Minor"),
    "grpc.LinuxWeightDevice": ("Major", "Minor"),
    "grpc.LinuxThrottleDevice": ("Major", "Minor", "Rate"),
    "grpc.LinuxDeviceCgroup": ("Allow",),
    "grpc.LinuxHugepageLimit": ("Pagesize", "Limit"),
    "grpc.LinuxSeccompArg": ("Index", "Value", "ValueTwo"),
}


class OciError(ValueError):
    """A JSON value does not fit; the text starts with its path."""


def fill(message: Message, raw: dict[str, Any], where: str) -> None:
    """Set the fields of `message` from a JSON object; keys that the message does not have are left out.

    Raises:
        OciError: a value has the wrong type; `where` and the keys below it name it.
    """
    if not isinstance(raw, dict):
        raise OciError(f"{where}: want an object, got {type(raw).__name__}")
    for field in _fields(message):
        name = json_name(field)
        value = raw.get(name)
        if value is not None:
            _set(message, field, value, f"{where}.{name}")


def to_json(message: Message) -> dict[str, Any]:
    """The JSON object of a message; fields that are not set are left out."""
    always = _ALWAYS.get(message.DESCRIPTOR.full_name, ())
    result: dict[str, Any] = {}
    for field in _fields(message):
        value = getattr(message, field.name)
        if field.message_type is None:
            if field.is_repeated:
                value = list(value)
            elif (
                field.containing_oneof is not None
            ):  # has a presence of its own: errno 0 is an error number too
                if message.HasField(field.name):
                    result[json_name(field)] = value
                continue
        elif _is_map(value):
            value = dict(value)
        elif field.is_repeated:
            value = [to_json(item) for item in value]
        elif message.HasField(field.name):
            result[json_name(field)] = to_json(value)
            continue
        else:
            continue
        if value or field.name in always:
            result[json_name(field)] = value
    return result


def json_name(field: FieldDescriptor) -> str:
    """The JSON key of a message's field."""
    if field.full_name in _EXCEPTIONS:
        return _EXCEPTIONS[field.full_name]
    name = field.name
    capitals = 0
    while capitals < len(name) and not name[capitals].islower():
        capitals += 1
    # The last of several capitals begins the next word: "OOMScoreAdj" is OOM + Score.
    lowered = capitals if capitals in (1, len(name)) else capitals - 1
    return name[:lowered].lower() + name[lowered:]


def _is_map(value: object) -> bool:
    """Told by what it offers: the descriptor's options would do too, but reading them imports descriptor_pb2."""
    return hasattr(value, "items")


def _fields(message: Message) -> list[FieldDescriptor]:
    fields: list[FieldDescriptor] = list(message.DESCRIPTOR.fields)  # type: ignore[arg-type]
    return fields


def _set(message: Message, field: FieldDescriptor, value: Any, where: str) -> None:
    is_map = _is_map(getattr(message, field.name))
    if field.is_repeated and not is_map and not isinstance(value, list):
        # A string would be taken for the list of its letters.
        raise OciError(f"{where}: want an array, got {type(value).__name__}")
    try:
        if field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
        elif is_map:
            getattr(message, field.name).update(value)
        elif field.is_repeated:
            for index, item in enumerate(value):
                fill(getattr(message, field.name).add(), item, f"{where}[{index}]")
        else:
            child = getattr(message, field.name)
            child.SetInParent()
            fill(child, value, where)
    except OciError:
        raise
    except (TypeError, ValueError) as err:
        raise OciError(f"{where}: {err}") from err

# mypy: ignore-errors
"""Message classes of generated modules, each made when somebody first asks for it, with all that it may hold."""

from google._upb._message import MessageMeta
from google.protobuf.message import Message

_made = {}


def _message_class(descriptor, module_name):
    """The C library expects the classes of a message's fields to be there before it meets a value of theirs."""
    name = descriptor.full_name
    if name not in _made:
        members = {"DESCRIPTOR": descriptor, "__module__": module_name}
        _made[name] = None  # for messages that hold messages of their own type
        for nested in descriptor.nested_types:
            members[nested.name] = _message_class(nested, module_name)
        _made[name] = MessageMeta(descriptor.name, (Message,), members)
        for field in descriptor.fields:
            if field.message_type is not None:
                _message_class(field.message_type, module_name)
    return _made[name]


def BuildMessageAndEnumDescriptors(file_descriptor, module):
    pass


def BuildTopDescriptorsAndMessages(file_descriptor, module_name, module):
    messages = file_descriptor.message_types_by_name
    enums = file_descriptor.enum_types_by_name

    def __getattr__(name):
        if name in messages:
            made = _message_class(messages[name], module_name)
        elif name in enums:
            from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

            made = EnumTypeWrapper(enums[name])
        else:
            raise AttributeError(f"module {module_name} has no attribute {name}")
        module[name] = made
        return made

    module["__getattr__"] = __getattr__
    for enum in enums.values():
        for value in enum.values:
            module[value.name] = value.number

# mypy: ignore-errors
from google.protobuf.internal.builder import _message_class


def GetMessageClass(descriptor):
    return _message_class(descriptor, descriptor.full_name.rpartition(".")[0])

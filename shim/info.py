"""The `-info` action: what this runtime is, as containerd 2 asks for it before the first use."""

from shim import RUNTIME_NAME, VERSION
from shim.protowire import bytes_field


def runtime_info() -> bytes:
    """The serialized `containerd.types.RuntimeInfo`: name and version."""
    version = bytes_field(1, VERSION)
    return bytes_field(1, RUNTIME_NAME) + bytes_field(2, version)

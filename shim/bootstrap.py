"""What containerd tells `start`: flags, environment and stdin in three dialects, as one typed record.

containerd up to 2.2 writes the runtime options (a `google.protobuf.Any`) or nothing to stdin; from 2.3 on a
`containerd.runtime.bootstrap.v1.BootstrapParams`. The two decode as each other, so stdin is believed to be
BootstrapParams only when its id and namespace are those of the flags.
"""

import os

from shim import protowire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.cli import Flags

SOCKET_DIR = "/run/containerd/s"
# containerd keeps the bundles of the Sandbox API apart, in folders named after the plugin that made them:
# "...controller.v1.shim" in 2.x, "...controller.v1.local" in 1.7. They have a config.json only if the client gave one.
SANDBOX_CONTROLLER = "/io.containerd.sandbox.controller.v1."
_STDIN_LIMIT = 4 << 20
_DEBUG_LEVELS = (-4 & 0xFFFF_FFFF_FFFF_FFFF, -8 & 0xFFFF_FFFF_FFFF_FFFF)  # LOG_LEVEL_DEBUG, LOG_LEVEL_TRACE
_OPTIONS_URL = "runtimeoptions.v1.Options"


class Bootstrap:
    """One pod's start: who asks, where its bundle is and where answers and events go.

    `options` is the serialized `google.protobuf.Any` of the runtime options, empty when none were given;
    `speaks_protobuf` says that containerd reads the answer as a BootstrapResult; `sandbox_api` that containerd
    manages the sandbox by its Sandbox API, and not as the pod's first container; `answers_version_3` that it is a
    containerd which reads version 3 of the answer in JSON.
    """

    def __init__(self, flags: "Flags", env: "Mapping[str, str]", bundle: str) -> None:
        self.id = flags.id
        self.namespace = flags.namespace or env.get("NAMESPACE", "")
        self.bundle = bundle
        self.debug = flags.debug
        self.grpc_address = flags.address or env.get("GRPC_ADDRESS", "")
        self.ttrpc_address = env.get("TTRPC_ADDRESS", "")
        self.socket_dir = SOCKET_DIR
        self.options = b""
        self.speaks_protobuf = False
        self.sandbox_api = SANDBOX_CONTROLLER in bundle
        self.answers_version_3 = f"{SANDBOX_CONTROLLER}shim/" in bundle

    def read_stdin(self, data: bytes) -> None:
        """Take in what containerd wrote to stdin. Bytes that are neither dialect are no reason to fail: the
        options come again with `Create`."""
        try:
            message = list(protowire.fields(data))
            named = {number: value for number, value in message if number in (1, 2)}
            is_params = named == {1: self.id.encode(), 2: self.namespace.encode()}
        except ValueError:
            return
        if is_params:
            self._read_params(message)
        elif data:
            self.options = data

    def _read_params(self, message: list[tuple[int, protowire.Value]]) -> None:
        self.speaks_protobuf = True
        for number, value in message:
            if number == 3:
                self.debug = self.debug or value in _DEBUG_LEVELS
            elif number == 5:
                self.ttrpc_address = protowire.text(value) or self.ttrpc_address
            elif number == 6:
                self.grpc_address = protowire.text(value) or self.grpc_address
            elif number == 8 and isinstance(value, bytes):
                self._read_extension(value)
            elif number == 9:
                self.socket_dir = protowire.text(value) or self.socket_dir

    def _read_extension(self, extension: bytes) -> None:
        for number, value in protowire.fields(extension):
            if number == 1 and isinstance(value, bytes) and config_path(value) is not None:
                self.options = value


def config_path(options: bytes) -> str | None:
    """The `config_path` of serialized runtime options; "" when they name none, None when they are not
    `runtimeoptions.v1.Options` at all (another runtime's options, or not an Any)."""
    try:
        any_fields = dict(protowire.fields(options))
        if protowire.text(any_fields.get(1, b"")).rpartition("/")[2] != _OPTIONS_URL:
            return None
        value = any_fields.get(2, b"")
        return protowire.text(dict(protowire.fields(value)).get(2, b"")) if isinstance(value, bytes) else None
    except ValueError:
        return None


def read_stdin() -> bytes:
    """All of stdin, at most 4 MiB; nothing from a terminal, which would never end."""
    if os.isatty(0):
        return b""
    chunks, size = [], 0
    while size < _STDIN_LIMIT:
        try:
            chunk = os.read(0, 65536)
        except OSError:  # no stdin at all
            break
        if not chunk:
            break
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)

"""The OCI specification as the container engine reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_proto.oci_json import to_json

if TYPE_CHECKING:
    from agent_proto.gen import oci_pb2

    Json = dict[str, object]

# No field of the messages means something else in another 1.x, and a caller's own version says nothing about them.
OCI_VERSION = "1.0.2"


def spec_to_json(spec: oci_pb2.Spec) -> Json:
    """A whole specification, as the engine takes it."""
    return {**to_json(spec), "ociVersion": OCI_VERSION}

"""The OCI specification as the container engine reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_proto.oci_json import to_json

if TYPE_CHECKING:
    from agent_proto.gen import oci_pb2

    Json = dict[str, object]

# crun 1.8, in Debian 12, refuses a version above 1.0; later ones take it too, and no key means something else in it.
OCI_VERSION = "1.0.2"


def spec_to_json(spec: oci_pb2.Spec) -> Json:
    """A whole specification, in the version that every engine takes."""
    return {**to_json(spec), "ociVersion": OCI_VERSION}

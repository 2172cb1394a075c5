"""The part of containerd's configuration that switches Kubernetes' interface (CRI) on, with our runtime in it.

The same settings have other names in every generation of containerd: version 2 of the file (1.6, 1.7) keeps them in
one table, version 3 (2.x) has one for the streaming server, one for images and one for the runtime.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The plugins that the interface consists of; a private containerd without a `CriConfig` has them off.
PLUGINS = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.internal.v1.cri",
)

Value = str | bool | int | list[str]
Table = dict[str, Value]


@dataclass(frozen=True, kw_only=True)
class Handler:
    """A runtime class. `options` is the table that the shim gets, `settings` what the CRI plugin itself reads."""

    runtime_type: str
    options: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CriConfig:
    """What the CRI plugin of a private containerd needs to know. The first of `handlers` is the default one.

    `networks` is the folder with the CNI configuration, `network_programs` the one with the CNI plugins.
    """

    snapshotter: str
    pause_image: str
    handlers: Mapping[str, Handler]
    networks: Path
    network_programs: Path

    def render(self, version: int) -> str:
        """TOML for a configuration file of that version, 2 or 3."""
        server: Table = {"stream_server_address": "127.0.0.1", "stream_server_port": "0"}
        runtime: Table = {
            # In the state folder instead of /run/netns, which belongs to the whole host.
            "netns_mounts_under_state_dir": True,
        }
        if version == 2:
            plugin = '[plugins."io.containerd.grpc.v1.cri"'
            return "\n".join(
                [
                    *_table(f"{plugin}]", {**server, **runtime, "sandbox_image": self.pause_image}),
                    *_table(f"{plugin}.containerd]", {"snapshotter": self.snapshotter, **self._default()}),
                    *self._rest(plugin, program_folder={"bin_dir": str(self.network_programs)}),
                ]
            )
        images, plugin = '[plugins."io.containerd.cri.v1.images"', '[plugins."io.containerd.cri.v1.runtime"'
        return "\n".join(
            [
                *_table('[plugins."io.containerd.grpc.v1.cri"]', server),
                *_table(f"{images}]", {"snapshotter": self.snapshotter}),
                *_table(f"{images}.pinned_images]", {"sandbox": self.pause_image}),
                *_table(f"{plugin}]", runtime),
                *_table(f"{plugin}.containerd]", self._default()),
                *self._rest(plugin, program_folder={"bin_dirs": [str(self.network_programs)]}),
            ]
        )

    def _default(self) -> Table:
        return {"default_runtime_name": next(iter(self.handlers))}

    def _rest(self, plugin: str, *, program_folder: Table) -> list[str]:
        lines = _table(f"{plugin}.cni]", {"conf_dir": str(self.networks), **program_folder})
        for name, handler in self.handlers.items():
            table = f"{plugin}.containerd.runtimes.{json.dumps(name)}"
            lines += _table(f"{table}]", {"runtime_type": handler.runtime_type, **handler.settings})
            if handler.options:
                lines += _table(f"{table}.options]", handler.options)
        return lines


def _table(header: str, values: Mapping[str, Value]) -> list[str]:
    # JSON strings, numbers, booleans and lists of strings are TOML ones as well.
    return [header, *(f"  {key} = {json.dumps(value)}" for key, value in values.items())]

"""Interfaces that real CNI plugins (Debian's containernetworking-plugins) make in a network namespace, plugin by plugin
as a runtime runs a chain of them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path("/usr/lib/cni")
_VERSION = "0.4.0"


@dataclass(frozen=True)
class Chain:
    """A network's plugins, in their order; `name` is the network's."""

    name: str
    plugins: tuple[dict[str, Any], ...]

    def add(self, netns: str, interface: str) -> None:
        """Each plugin gets the result of the one before."""
        result: dict[str, Any] = {}
        for plugin in self.plugins:
            result = json.loads(self._run("ADD", plugin, netns, interface, result))

    def delete(self, netns: str, interface: str) -> None:
        """The last one is the first to clean up."""
        for plugin in reversed(self.plugins):
            self._run("DEL", plugin, netns, interface, {})

    def _run(
        self, command: str, plugin: dict[str, Any], netns: str, interface: str, result: dict[str, Any]
    ) -> str:
        words = {"cniVersion": _VERSION, "name": self.name, **plugin}
        done = subprocess.run(
            [str(PROGRAMS / plugin["type"])],
            input=json.dumps({**words, "prevResult": result} if result else words),
            env=os.environ
            | {
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": self.name,
                "CNI_NETNS": netns,
                "CNI_IFNAME": interface,
                "CNI_PATH": str(PROGRAMS),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{plugin['type']} {command}: {done.stdout}{done.stderr}"
        return done.stdout


def second_network(name: str, bridge: str, state: Path, *, ipv4: str, ipv6: str) -> Chain:
    """A bridge with an address of the host's, and for its interfaces routing tables of their own, by which all leaves
    that comes from their addresses. `ipv4` and `ipv6` are subnets."""
    ranges = [[{"subnet": subnet}] for subnet in (ipv4, ipv6)]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    addresses = {"type": "host-local", "dataDir": str(state), "ranges": ranges, "routes": routes}
    made = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipam": addresses}
    return Chain(name, (made, {"type": "sbr"}))

"""Network namespaces of the bench's own: one that plays the rest of the world, and what is connected to it.

    world 198.18.1.1 ---- 198.18.1.2 eth0, in the namespace that a pod is given
          198.18.2.1 ---- eth0 | hand0, a tap; behind it is 198.18.2.2, a guest driven by hand

No cable's end is in the host's own namespace. The addresses are those set aside for measuring (RFC 2544).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lab import checked

if TYPE_CHECKING:
    from collections.abc import Iterator

TO_POD, POD = "198.18.1.1", "198.18.1.2"
TO_HAND, HAND = "198.18.2.1", "198.18.2.2"
POD_MAC, HAND_MAC = "02:00:c6:12:01:02", "02:00:c6:12:02:02"
TAP = "hand0"


@dataclass(frozen=True)
class Cables:
    """The namespaces. In `empty` there is nothing but a loopback interface."""

    world: Path
    pod: Path
    hand: Path
    empty: Path


@contextmanager
def cables() -> Iterator[Cables]:
    """All of them for the length of the block. Raises BenchError."""
    with ExitStack() as undo:
        world, pod, hand, empty = (_namespace(name, undo) for name in ("world", "pod", "hand", "empty"))
        _cable(world, "pod", TO_POD, pod, POD_MAC)
        _cable(world, "hand", TO_HAND, hand, HAND_MAC)
        # As a CNI plugin leaves it.
        _ip(pod, f"address add {POD}/24 dev eth0")
        _ip(pod, f"route add default via {TO_POD}")
        _ip(hand, f"tuntap add {TAP} mode tap vnet_hdr")
        _ip(hand, f"link set {TAP} up")
        for source, target in (("eth0", TAP), (TAP, "eth0")):
            _tc(hand, f"qdisc add dev {source} ingress")
            everything = "parent ffff: protocol all u32 match u8 0 0"
            _tc(
                hand,
                f"filter add dev {source} {everything} action mirred egress redirect dev {target}",
            )
        yield Cables(world, pod, hand, empty)


def _namespace(purpose: str, undo: ExitStack) -> Path:
    path = Path("/run/netns") / f"kpb-{purpose}-{os.getpid()}"
    checked(["ip", "netns", "add", path.name])
    undo.callback(checked, ["ip", "netns", "delete", path.name])
    _ip(path, "link set lo up")
    return path


def _cable(world: Path, name: str, address: str, other: Path, mac: str) -> None:
    _ip(world, f"link add {name} type veth peer name eth0 address {mac} netns {other.name}")
    _ip(world, f"address add {address}/24 dev {name}")
    _ip(world, f"link set {name} up")
    _ip(other, "link set eth0 up")


def _ip(namespace: Path, words: str) -> None:
    checked(["ip", "-n", namespace.name, *words.split()])


def _tc(namespace: Path, words: str) -> None:
    checked(["tc", "-n", namespace.name, *words.split()])

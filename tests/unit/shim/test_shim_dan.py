"""Descriptions of direct networks: what the guest gets of them, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.spec import Nic
from shim import dan
from shim.errors import InvalidRequest
from shim.interfaces import interface_to_proto
from shim.routing import neighbours_to_proto, routes_to_proto

if TYPE_CHECKING:
    from collections.abc import Callable

FILE: dict[str, Any] = {
    "netns": "/run/netns/pod",
    "devices": [
        {
            "name": "eth0",
            "guest_mac": "0A:58:0a:d6:00:02",
            "device": {"type": "host-tap", "tap_name": "tap0", "queue_num": 2, "queue_size": 512},
            "network_info": {
                "interface": {
                    "ip_addresses": ["10.1.0.2/24", "fd00::2/64"], "mtu": 1400, "ntype": "tuntap", "flags": 0,
                },
                "routes": [
                    {"dest": "10.9.0.0/16", "source": "10.1.0.2", "gateway": "", "scope": 253, "flags": 0},
                    {"gateway": "10.1.0.1"},
                    {"dest": "", "gateway": "fd00::1"},
                ],
                "neighbors": [{"ip_address": "10.1.0.1/24", "device": "", "hardware_addr": "02:00:00:00:00:01"}],
            },
        },
        {
            "name": "eth1",
            "guest_mac": "0a:58:0a:d6:00:03",
            "device": {"type": "vhost-user", "path": "/run/switch/port.sock"},
        },
    ],
}  # fmt: skip


def written(folder: Path, content: object) -> str:
    (folder / "s1.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_what_a_guest_gets(tmp_path: Path) -> None:
    network = dan.read(written(tmp_path, FILE), "s1")
    assert network is not None
    assert network.netns == "/run/netns/pod"
    assert dan.nics_of(network, vhost=True) == (
        Nic(id="direct0", mac="0a:58:0a:d6:00:02", tap="tap0", queues=2, queue_size=512, existing=True),
        Nic(id="direct1", mac="0a:58:0a:d6:00:03", tap="", vhost=False, vhost_user=Path("/run/switch/port.sock")),
    )  # fmt: skip
    assert not dan.nics_of(network, vhost=False)[0].vhost
    snapshot = dan.snapshot_of(network)
    first, second = map(interface_to_proto, snapshot.interfaces)
    assert (first.name, first.hwAddr, first.mtu, first.type) == ("eth0", "0a:58:0a:d6:00:02", 1400, "tuntap")
    assert [(a.address, a.mask) for a in first.IPAddresses] == [("10.1.0.2", "24"), ("fd00::2", "64")]
    assert (second.name, second.mtu, list(second.IPAddresses)) == ("eth1", 1500, [])
    assert [
        (r.dest, r.gateway, r.source, r.scope, r.device, r.family) for r in routes_to_proto(snapshot).Routes
    ] == [
        ("10.9.0.0/16", "", "10.1.0.2", 253, "eth0", 0),
        ("", "10.1.0.1", "", 0, "eth0", 0),
        ("", "fd00::1", "", 0, "eth0", 1),
    ]
    (neighbour,) = neighbours_to_proto(snapshot).ARPNeighbors
    assert (neighbour.toIPAddress.address, neighbour.lladdr, neighbour.state) == (
        *("10.1.0.1", "02:00:00:00:00:01", 0x80),
    )


def test_a_sandbox_without_a_file(tmp_path: Path) -> None:
    assert dan.read(str(tmp_path), "s1") is None
    assert dan.read(str(tmp_path / "nowhere"), "s1") is None


def device(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["devices"][0]["device"].update(changed)


def info(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["devices"][0]["network_info"].update(changed)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (device(type="physical"), "Invalid enum value 'physical'"),
        (device(tap_name=""), "device 'eth0': tap_name: want 1 to 15 bytes, got ''"),
        (device(tap_name="x" * 16), "tap_name: want 1 to 15 bytes"),
        (device(queue_num=257), "queue_num: want 0 to 256, got 257"),
        (device(queue_size=300), "queue_size: want 256, 512 or 1024, or 0 for 256, got 300"),
        (device(type="vhost-user", path="port.sock"), "path: want the absolute path of a socket, got 'port.sock'"),
        (lambda file: file["devices"][0].update(guest_mac="nonsense"), "'nonsense' is no MAC address"),
        (lambda file: file["devices"][0].pop("name"), "missing required field `name`"),
        (lambda file: file.pop("devices"), "missing required field `devices`"),
        (info(interface={"ip_addresses": ["10.1.0.300/24"]}), "'10.1.0.300/24' does not appear to be"),
        (info(routes=[{"dest": "10.0.0.0/8", "gateway": "fd00::1"}]), "want addresses of one family"),
        (info(routes=[{}]), "route to everywhere: want addresses of one family"),
        (info(neighbors=[{"ip_address": "10.1.0.1", "hardware_addr": ""}]), "'' is no MAC address"),
        (info(neighbors=[{"hardware_addr": "02:00:00:00:00:01"}]), "'' does not appear to be"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    file = json.loads(json.dumps(FILE))
    change(file)
    with pytest.raises(InvalidRequest) as caught:
        dan.read(written(tmp_path, file), "s1")
    assert str(caught.value).startswith(f"direct network of sandbox s1: {tmp_path}/s1.json: ")
    assert problem in str(caught.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="truncated"):
        dan.read(written(tmp_path, "{"), "s1")
    (tmp_path / "s2.json").mkdir()
    with pytest.raises(InvalidRequest, match="Is a directory"):
        dan.read(str(tmp_path), "s2")

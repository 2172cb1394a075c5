"""Directly attachable networks: what `<dan_conf>/<sandbox id>.json` gives a guest, in the place of its namespace's own.

Somebody else has made the taps, or serves the vhost-user sockets, and moves the packets; here they are only handed to
QEMU, and the guest is told addresses, routes and neighbours as the file has them. Nothing changes while it runs.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_interface
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Literal

import msgspec

from hypervisor.spec import Nic
from hypervisor.tap import NAME_BYTES
from netlink.objects import NUD_PERMANENT, Address, Link, Neighbour, mac_bytes
from netlink.routes import ONLINK, RTAX_MTU, Route, Way
from shim.errors import InvalidRequest
from shim.interfaces import Interface, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_QUEUES = 256
_FAMILIES = {4: AF_INET, 6: AF_INET6}


class Device(msgspec.Struct, frozen=True):
    """What carries the packets; `tap_name` is for host taps, `path` for vhost-user. Kata leaves out what is 0."""

    type: Literal["host-tap", "vhost-user"]
    tap_name: str = ""
    path: str = ""
    queue_num: int = 0
    queue_size: int = 0


class DirectInterface(msgspec.Struct, frozen=True):
    """`ip_addresses` are `address/prefix`, `mtu` bytes, `flags` those of the kernel."""

    ip_addresses: tuple[str, ...] = ()
    mtu: int = 1500
    ntype: str = ""
    flags: int = 0


class DirectRoute(msgspec.Struct, frozen=True):
    """An empty destination is the default route."""

    dest: str = ""
    gateway: str = ""
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0


class DirectNeighbour(msgspec.Struct, frozen=True):
    """A MAC address on the interface's link. Without a state it is permanent."""

    ip_address: str = ""
    hardware_addr: str = ""
    state: int = 0
    flags: int = 0


class NetworkInfo(msgspec.Struct, frozen=True):
    """What the guest is told of one interface."""

    interface: DirectInterface = DirectInterface()
    routes: tuple[DirectRoute, ...] = ()
    neighbors: tuple[DirectNeighbour, ...] = ()


class DirectDevice(msgspec.Struct, frozen=True):
    """One interface; `name` is the guest's."""

    name: str
    guest_mac: str
    device: Device
    network_info: NetworkInfo = NetworkInfo()


class DirectNetwork(msgspec.Struct, frozen=True):
    """The whole file; `netns` is where the taps are."""

    devices: tuple[DirectDevice, ...]
    netns: str = ""


def read(directory: str, sandbox_id: str) -> DirectNetwork | None:
    """The sandbox's file; None when it has none.

    Raises:
        InvalidRequest: it cannot be read or used; says where.
    """
    path = Path(directory, f"{sandbox_id}.json")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=DirectNetwork)
        nics_of(found, vhost=False)
        snapshot_of(found)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise InvalidRequest(f"direct network of sandbox {sandbox_id}: {path}: {err.strerror}") from err
    except (msgspec.MsgspecError, ValueError) as err:
        raise InvalidRequest(f"direct network of sandbox {sandbox_id}: {path}: {err}") from err
    return found


def nics_of(network: DirectNetwork, *, vhost: bool) -> tuple[Nic, ...]:
    """The guest's interfaces. `vhost` lets the host's kernel carry packets of taps where it can."""
    return tuple(_nics(network, vhost=vhost))


def _nics(network: DirectNetwork, *, vhost: bool) -> Iterator[Nic]:
    for index, entry in enumerate(network.devices):
        device, where = entry.device, f"device {entry.name!r}"
        if not 0 <= device.queue_num <= _MOST_QUEUES:
            raise ValueError(f"{where}: queue_num: want 0 to {_MOST_QUEUES}, got {device.queue_num}")
        size = device.queue_size
        if size and (size & (size - 1) or not 256 <= size <= 1024):
            raise ValueError(f"{where}: queue_size: want 256, 512 or 1024, or 0 for 256, got {size}")
        by_tap = device.type == "host-tap"
        if by_tap and not 0 < len(device.tap_name.encode()) <= NAME_BYTES:
            raise ValueError(f"{where}: tap_name: want 1 to {NAME_BYTES} bytes, got {device.tap_name!r}")
        if not by_tap and not device.path.startswith("/"):
            raise ValueError(f"{where}: path: want the absolute path of a socket, got {device.path!r}")
        yield Nic(
            id=f"direct{index}",
            mac=_mac(entry.guest_mac, where),
            tap=device.tap_name,
            queues=device.queue_num or 1,
            queue_size=size,
            vhost=vhost and by_tap,
            existing=by_tap,
            vhost_user=None if by_tap else Path(device.path),
        )


def snapshot_of(network: DirectNetwork) -> Snapshot:
    """What the guest is told. Raises ValueError for what is no address."""
    interfaces, routes, neighbours = [], [], []
    for index, entry in enumerate(network.devices, start=1):
        info, where = entry.network_info, f"device {entry.name!r}"
        mac = _mac(entry.guest_mac, where)
        link = Link(index, entry.name, mac, info.interface.mtu, info.interface.flags, info.interface.ntype)
        addresses = (ip_interface(text) for text in info.interface.ip_addresses)
        interfaces.append(
            Interface(
                link,
                tuple(
                    Address(index, _FAMILIES[each.version], str(each.ip), each.network.prefixlen)
                    for each in addresses
                ),
            )
        )
        routes += [_route(index, route) for route in info.routes]
        neighbours += [_neighbour(index, neighbour, where) for neighbour in info.neighbors]
    return Snapshot(tuple(interfaces), tuple(routes), tuple(neighbours))


def _route(ifindex: int, route: DirectRoute) -> Route:
    given = [ip_interface(text) for text in (route.dest, route.gateway, route.source) if text]
    if len({each.version for each in given}) != 1:
        raise ValueError(f"route to {route.dest or 'everywhere'}: want addresses of one family")
    return Route(
        family=_FAMILIES[given[0].version],
        destination=str(ip_interface(route.dest).network) if route.dest else "",
        ways=(Way(ifindex, str(ip_address(route.gateway)) if route.gateway else "", route.flags & ONLINK),),
        source=str(ip_address(route.source)) if route.source else "",
        scope=route.scope,
        metrics=((RTAX_MTU, route.mtu),) if route.mtu else (),
    )


def _neighbour(ifindex: int, neighbour: DirectNeighbour, where: str) -> Neighbour:
    address = ip_interface(neighbour.ip_address).ip
    return Neighbour(
        ifindex,
        _FAMILIES[address.version],
        str(address),
        _mac(neighbour.hardware_addr, where),
        neighbour.state or NUD_PERMANENT,
        neighbour.flags,
    )


def _mac(text: str, where: str) -> str:
    try:
        return mac_bytes(text).hex(":")
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no MAC address") from None

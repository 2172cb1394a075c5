"""Interfaces of kinds that few kernels have all of, each with its packets, in the namespace of one pod."""

from __future__ import annotations

import subprocess
import urllib.request
from typing import TYPE_CHECKING, NamedTuple

import pytest

from netlink import objects, wire
from netlink.rtnl import RTM_NEWLINK, Rtnetlink
from tests.integration.test_network import SLEEP, Namespace, in_guest, ip, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

OUTSIDE = "kpoutside"
WORDS = "over the interface"
# <linux/if_link.h>: attributes and modes of netkit, and of what an interface of any kind may be told.
PEER_INFO, MODE = 1, 5
L2, L3 = 0, 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 3, 18, 28
INFO_KIND, INFO_DATA = 1, 2


class Kind(NamedTuple):
    """How a pod's interface comes about. `link` goes behind `ip link add`, with {parent}, {inner} and {netns} in it; a
    netkit is made by its mode alone. `own_end` is the host's interface that can be reached, with the parent's other end
    as {peer}; none when packets go nowhere."""

    name: str
    link: str = ""
    mode: int = L2
    own_end: str = "{peer}"
    routed: bool = False
    """Whether the host itself stands between the pod and the other end, which then is in a namespace of its own."""


KINDS = (
    Kind("dummy", "{inner} netns {netns} type dummy", own_end=""),
    Kind("vlan", "link {parent} name {inner} netns {netns} type vlan id 5", own_end="{peer}.5"),
    Kind("macvlan", "link {parent} name {inner} netns {netns} type macvlan mode bridge"),
    Kind("ipvlan", "link {parent} name {inner} netns {netns} type ipvlan mode l2"),
    Kind("ipvlan-l3", "link {parent} name {inner} netns {netns} type ipvlan mode l3", routed=True),
    Kind("netkit", own_end="{parent}"),
    Kind("netkit-l3", mode=L3, own_end="{parent}"),
)
BY_NAME = {kind.name: number for number, kind in enumerate(KINDS)}


class Pod(NamedTuple):
    """A running container, and why some kinds are not among its interfaces."""

    container: str
    missing: dict[str, str]


def addresses(number: int) -> tuple[str, str]:
    """The host's and the pod's on the interface with this number."""
    return f"10.{150 + number}.0.1", f"10.{150 + number}.0.2"


def netkit(outer: str, inner: str, mode: int, netns: str) -> None:
    """A pair with one end in a namespace; iproute2 of Debian 12 does not know the kind."""
    with open(netns) as there, Rtnetlink() as rtnl:
        peer = wire.attribute(IFLA_IFNAME, inner) + wire.attribute(IFLA_NET_NS_FD, there.fileno())
        data = wire.attribute(PEER_INFO, bytes(objects.IFINFO.size) + peer) + wire.attribute(MODE, mode)
        info = wire.attribute(INFO_KIND, "netkit") + wire.attribute(INFO_DATA, data)
        body = bytes(objects.IFINFO.size) + wire.attribute(IFLA_IFNAME, outer)
        body += wire.attribute(IFLA_LINKINFO, info)
        rtnl.order(RTM_NEWLINK, wire.NLM_F_CREATE | wire.NLM_F_EXCL, body)


def connect(kind: Kind, number: int, namespace: Namespace) -> None:
    """Makes one, up and with an address; an error says that this kernel does not have the kind."""
    host, guest = addresses(number)
    parent, peer, inner = f"{namespace.name}p{number}", f"{namespace.name}h{number}", f"pod{number}"
    words = {"parent": parent, "peer": peer, "inner": inner, "netns": namespace.name}
    namespace.cables.append(parent)
    if kind.link:
        ip(f"link add {parent} type veth peer name {peer}")
        ip(f"link set {parent} up")
        ip(f"link set {peer} up")
        ip("link add " + kind.link.format(**words))
    else:
        netkit(parent, inner, kind.mode, namespace.path)
        ip(f"link set {parent} up")
    namespace.ip(f"address add {guest}/24 dev {inner}")
    namespace.ip(f"link set {inner} up")
    own_end = kind.own_end.format(**words)
    if kind.routed:
        route(parent, own_end, number)
    elif own_end:
        if own_end.endswith(".5"):
            ip(f"link add link {peer} name {own_end} type vlan id 5")
            ip(f"link set {own_end} up")
        ip(f"address add {host}/24 dev {own_end}")


def route(parent: str, own_end: str, number: int) -> None:
    """Moves the cable's other end away. Nobody answers there, or here, when asked for a MAC address."""
    host, guest = addresses(number)
    mac, other_mac = (ip(f"-br link show {name}").split()[2] for name in (parent, own_end))
    ip(f"link set {own_end} netns {OUTSIDE}")
    ip(f"-n {OUTSIDE} link set {own_end} up")
    ip(f"-n {OUTSIDE} address add {host}/24 dev {own_end}")
    ip(f"-n {OUTSIDE} neighbour add {guest} lladdr {mac} dev {own_end} nud permanent")
    ip(f"route add {host}/32 dev {parent}")
    ip(f"neighbour add {host} lladdr {other_mac} dev {parent} nud permanent")


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    """With one interface of each kind that this kernel has."""
    namespace = Namespace("kpkinds")
    ip(f"netns add {namespace.name}")
    ip(f"netns add {OUTSIDE}")
    try:
        missing = {}
        for number, kind in enumerate(KINDS):
            try:
                connect(kind, number, namespace)
            except subprocess.CalledProcessError as err:
                missing[kind.name] = err.stderr.strip()
            except OSError as err:
                missing[kind.name] = str(err)
        options = ["--with-ns", f"network:{namespace.path}"]
        serve = f"mkdir /www; echo {WORDS} > /www/page; httpd -p 8080 -h /www; {SLEEP[2]}"
        container = containerd.start("sh", "-c", serve, options=options)
        yield Pod(container, missing)
        containerd.remove(container)
    finally:
        for cable in namespace.cables:
            subprocess.run(["ip", "link", "delete", cable], check=False, capture_output=True)
        ip(f"netns delete {OUTSIDE}")
        ip(f"netns delete {namespace.name}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind(containerd: Containerd, pod: Pod, kind: Kind) -> None:
    if kind.name in pod.missing:
        pytest.skip(f"this kernel has no links of the kind {kind.name}: {pod.missing[kind.name]}")
    number = BY_NAME[kind.name]
    host, guest = addresses(number)
    wait_for(containerd, pod.container, f"ip address show pod{number} | grep -q {guest}/24")
    if not kind.own_end:
        return
    done = containerd.exec(pod.container, "ping", "-c", "1", "-W", "10", host)
    assert done.returncode == 0, done.stdout + in_guest(containerd, pod.container, "ip", "address")
    if kind.routed:
        return
    wait_for(containerd, pod.container, "wget -q -O - http://127.0.0.1:8080/page")
    with urllib.request.urlopen(f"http://{guest}:8080/page", timeout=60) as answer:
        assert answer.read().decode() == f"{WORDS}\n"

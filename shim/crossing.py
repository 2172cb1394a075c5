"""How packets cross between an interface of the pod and the tap beside it, and how many of them.

By traffic control each of the two sends what the other one gets, whatever kind the interface is of. Where the pod's
has no MAC address, packets get that of the guest's on their way to it, and lose it on the way back: each end takes only
what is addressed to it. A macvtap is its
own crossing: the kernel's driver takes the interface's packets. Rates are limited where packets leave an interface: the
tap, towards the guest, and the pod's interface, away from it. A macvtap has no queue towards the guest, so there the
pod's interface passes its packets through an `ifb`, whose only purpose is to have one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from hypervisor.errors import HostUnsupported
from netlink import shaping, tc
from shim.interfaces import NO_MAC, mac_in_place, tap_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from config.schema import Qemu
    from netlink.objects import Link
    from netlink.rtnl import Rtnetlink


def join(rtnl: Rtnetlink, link: Link, settings: Qemu, *, macvtap: bool) -> None:
    """Let packets cross between the pod's interface and its tap, which is there by now.

    Raises:
        HostUnsupported: a rate cannot be limited here.
        OSError: the kernel refuses something else.
    """
    receive, send = settings.rx_rate_limiter_max_rate, settings.tx_rate_limiter_max_rate
    tap = _index(rtnl, tap_of(link.ifindex))
    rtnl.set_link(tap, mtu=link.mtu, up=True)
    if send:
        _limit(rtnl, link.ifindex, link.name, "tx_rate_limiter_max_rate", send)
    if not macvtap:
        if receive:
            _limit(rtnl, tap, link.name, "rx_rate_limiter_max_rate", receive)
        _exchange(rtnl, link, tap)
    elif receive:
        tc.redirect(rtnl, link.ifindex, _limited_detour(rtnl, link, receive))


def part(rtnl: Rtnetlink, ifindex: int) -> None:
    """Undo what `join` has put on the pod's interface, and remove what stands beside it.

    Harmless when repeated, or when the interface is gone. Raises OSError.
    """
    tc.end_redirect(rtnl, ifindex)
    shaping.end_limit(rtnl, ifindex)
    for left in _of_ours(rtnl, ifindex):
        try:
            rtnl.delete_link(left)
        except OSError as err:
            if err.errno != errno.ENODEV:  # a tap goes with QEMU, at any moment
                raise


def _exchange(rtnl: Rtnetlink, link: Link, tap: int) -> None:
    if link.mac != mac_in_place(link.ifindex):
        tc.redirect(rtnl, link.ifindex, tap)
        tc.redirect(rtnl, tap, link.ifindex)
        return
    try:
        tc.redirect(rtnl, link.ifindex, tap, to_mac=link.mac)
        tc.redirect(rtnl, tap, link.ifindex, to_mac=NO_MAC)
    except OSError as err:
        if err.errno != errno.ENOENT:
            raise
        raise HostUnsupported(
            f"interface {link.name} of the pod ({link.kind}) has no MAC address, and its packets cannot get one: "
            "load the kernel module act_skbmod"
        ) from err


def _limited_detour(rtnl: Rtnetlink, link: Link, rate: int) -> int:
    name = _detour_of(link.ifindex)
    try:
        rtnl.add_link(name, "ifb")
    except OSError as err:
        raise _no_limit(link.name, "rx_rate_limiter_max_rate", err, "ifb") from err
    detour = _index(rtnl, name)
    rtnl.set_link(detour, mtu=link.mtu, up=True)
    _limit(rtnl, detour, link.name, "rx_rate_limiter_max_rate", rate)
    return detour


def _limit(rtnl: Rtnetlink, ifindex: int, name: str, key: str, rate: int) -> None:
    try:
        shaping.limit(rtnl, ifindex, rate)
    except OSError as err:
        raise _no_limit(name, key, err, "sch_htb") from err


def _no_limit(name: str, key: str, err: OSError, module: str) -> HostUnsupported:
    why = {
        errno.EEXIST: "something else manages its queue already",
        errno.ENOENT: f"load the kernel module {module}",
        errno.EOPNOTSUPP: f"load the kernel module {module}",
    }.get(err.errno or 0, err.strerror)
    return HostUnsupported(f"{key}: cannot limit interface {name} of the pod: {why}; or set it to 0")


def _of_ours(rtnl: Rtnetlink, ifindex: int) -> Iterator[int]:
    names = (tap_of(ifindex), _detour_of(ifindex))
    return (link.ifindex for link in rtnl.links() if link.name in names)


def _detour_of(ifindex: int) -> str:
    return tap_of(ifindex).replace("tap", "ifb", 1)


def _index(rtnl: Rtnetlink, name: str) -> int:
    return next(link.ifindex for link in rtnl.links() if link.name == name)

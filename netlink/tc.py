"""Joining two interfaces: what comes in on one goes out on the other (tc(8): ingress, u32, skbmod, mirred).

The filter matches every packet by a comparison that is always true: `u32` is in kernels that lack `matchall`.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from netlink.objects import mac_bytes
from netlink.wire import NLM_F_CREATE, NLM_F_EXCL, attribute

if TYPE_CHECKING:
    from netlink.rtnl import Rtnetlink

# <linux/rtnetlink.h>, <linux/pkt_sched.h>, <linux/if_ether.h>
RTM_NEWQDISC, RTM_DELQDISC, _RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 36, 37, 44, 45, 46
_HANDLE_INGRESS, _PARENT_INGRESS = 0xFFFF0000, 0xFFFFFFF1
# The incoming half of a clsact queue, which others may have put there: sch_clsact takes the place of ingress.
_PARENT_CLSACT_INGRESS = 0xFFFFFFF2
_ETH_P_ALL = 3
#: After everybody else's filters, which may drop or change what comes in.
_PRIORITY = 0xC000
TCMSG = struct.Struct("=BxxxiIII")
TCA_KIND, TCA_OPTIONS = 1, 2
# <linux/pkt_cls.h>: a selector with one key, then an action.
_TCA_U32_SEL, _TCA_U32_ACT = 5, 7
_SELECTOR = struct.Struct("=BBBxHHhhI IIii")
_TERMINAL = 1
_NOTHING_THERE = (errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)
_TCA_ACT_KIND, _TCA_ACT_OPTIONS = 1, 2
# <linux/tc_act/tc_mirred.h>
_TCA_MIRRED_PARMS = 2
_MIRRED = struct.Struct("=IIiiiiI")
_EGRESS_REDIR, _STOLEN, _PIPE = 1, 4, 3
# <linux/tc_act/tc_skbmod.h>
_TCA_SKBMOD_PARMS, _TCA_SKBMOD_DMAC = 2, 3
_SKBMOD = struct.Struct("=IIiiiIQ")
_SKBMOD_F_DMAC = 1


def redirect(rtnl: Rtnetlink, source: int, target: int, *, to_mac: str = "") -> None:
    """Let all that comes in on the interface with index `source` go out on `target`, where `to_mac` is given with that
    for the MAC address that it goes to. Raises OSError.
    """
    try:
        rtnl.order(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, _queue(source))
    except OSError as err:
        if err.errno != errno.EEXIST:
            raise
    body = attribute(TCA_KIND, "u32") + attribute(TCA_OPTIONS, _everything_to(target, to_mac))
    try:
        rtnl.order(_RTM_NEWTFILTER, NLM_F_CREATE, _filter_head(source, _HANDLE_INGRESS) + body)
    except OSError as err:
        if err.errno not in _NOTHING_THERE:
            raise
        rtnl.order(_RTM_NEWTFILTER, NLM_F_CREATE, _filter_head(source, _PARENT_CLSACT_INGRESS) + body)


def end_redirect(rtnl: Rtnetlink, source: int) -> None:
    """Undo `redirect`. An ingress queue goes with its last filter; what others have put there stays.

    Harmless when there is nothing to undo. Raises OSError.
    """
    order_if_there(rtnl, _RTM_DELTFILTER, _filter_head(source, _HANDLE_INGRESS))
    order_if_there(rtnl, _RTM_DELTFILTER, _filter_head(source, _PARENT_CLSACT_INGRESS))
    if not rtnl.dump(_RTM_GETTFILTER, TCMSG.pack(0, source, 0, _HANDLE_INGRESS, 0), _RTM_NEWTFILTER):
        order_if_there(rtnl, RTM_DELQDISC, _queue(source))


def order_if_there(rtnl: Rtnetlink, kind: int, body: bytes) -> None:
    """Give an order to remove something, which may not be there. Raises OSError."""
    try:
        rtnl.order(kind, 0, body)
    except OSError as err:
        if err.errno not in _NOTHING_THERE:
            raise


def _queue(source: int) -> bytes:
    return TCMSG.pack(0, source, _HANDLE_INGRESS, _PARENT_INGRESS, 0) + attribute(TCA_KIND, "ingress")


def _filter_head(index: int, parent: int) -> bytes:
    # The protocol is in network byte order.
    info = (_PRIORITY << 16) | struct.unpack("=H", struct.pack("!H", _ETH_P_ALL))[0]
    return TCMSG.pack(0, index, 0, parent, info)


def _everything_to(target: int, to_mac: str) -> bytes:
    """The options of a u32 filter: a key whose mask is zero, and what is done with what it finds."""
    selector = _SELECTOR.pack(_TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    parameters = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIR, target)
    actions = [_action("mirred", attribute(_TCA_MIRRED_PARMS, parameters))]
    if to_mac:
        changed = attribute(_TCA_SKBMOD_PARMS, _SKBMOD.pack(0, 0, _PIPE, 0, 0, 0, _SKBMOD_F_DMAC))
        actions.insert(0, _action("skbmod", changed + attribute(_TCA_SKBMOD_DMAC, mac_bytes(to_mac))))
    in_order = b"".join(attribute(number, action) for number, action in enumerate(actions, start=1))
    return attribute(_TCA_U32_SEL, selector) + attribute(_TCA_U32_ACT, in_order)


def _action(kind: str, options: bytes) -> bytes:
    return attribute(_TCA_ACT_KIND, kind) + attribute(_TCA_ACT_OPTIONS, options)

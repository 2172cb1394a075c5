"""Limiting what an interface sends (tc-htb(8)): a queue with one class, in which everything is.

The queue has a handle that nobody gives by accident, so that only ours is ever removed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from netlink.tc import RTM_DELQDISC, RTM_NEWQDISC, TCA_KIND, TCA_OPTIONS, TCMSG, order_if_there
from netlink.wire import NLM_F_CREATE, NLM_F_EXCL, attribute

if TYPE_CHECKING:
    from netlink.rtnl import Rtnetlink

_RTM_NEWTCLASS = 40  # <linux/rtnetlink.h>
# <linux/pkt_sched.h>
_ROOT = 0xFFFFFFFF
_HANDLE, _CLASS = 0x4B500000, 1
_TCA_HTB_PARMS, _TCA_HTB_INIT, _TCA_HTB_RATE64, _TCA_HTB_CEIL64 = 1, 2, 6, 7
_GLOBAL = struct.Struct("=IIIII")
_VERSION, _RATE_TO_QUANTUM = 3, 10
_RATE = struct.Struct("=BBHhHI")
_CLASS_PARAMETERS = struct.Struct("=IIIII")
_LINK_ETHERNET = 1
_U32_MAX = 2**32 - 1
_TICK_NS = 64
# What may be sent at once: ten milliseconds of the rate, and one packet of the largest size that is cut up later.
_BURST_S, _LEAST_BURST_BYTES = 0.01, 65536


def limit(rtnl: Rtnetlink, ifindex: int, bits_per_s: int) -> None:
    """Let the interface send no faster than that. Raises OSError: EEXIST when somebody else manages its queue."""
    root = TCMSG.pack(0, ifindex, _HANDLE, _ROOT, 0) + attribute(TCA_KIND, "htb")
    settings = attribute(_TCA_HTB_INIT, _GLOBAL.pack(_VERSION, _RATE_TO_QUANTUM, _CLASS, 0, 0))
    rtnl.order(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, root + attribute(TCA_OPTIONS, settings))
    head = TCMSG.pack(0, ifindex, _HANDLE | _CLASS, _HANDLE, 0) + attribute(TCA_KIND, "htb")
    options = attribute(TCA_OPTIONS, _class_settings(max(1, bits_per_s // 8)))
    rtnl.order(_RTM_NEWTCLASS, NLM_F_CREATE | NLM_F_EXCL, head + options)


def end_limit(rtnl: Rtnetlink, ifindex: int) -> None:
    """Undo `limit`. Harmless when there is none, or no such interface. Raises OSError."""
    order_if_there(rtnl, RTM_DELQDISC, TCMSG.pack(0, ifindex, _HANDLE, _ROOT, 0))


def _class_settings(bytes_per_s: int) -> bytes:
    rate = _RATE.pack(0, _LINK_ETHERNET, 0, 0, 0, min(bytes_per_s, _U32_MAX))
    burst_bytes = max(_LEAST_BURST_BYTES, int(bytes_per_s * _BURST_S))
    ticks = min(burst_bytes * 1_000_000_000 // bytes_per_s // _TICK_NS, _U32_MAX)
    parameters = _CLASS_PARAMETERS.pack(ticks, ticks, _LEAST_BURST_BYTES, 0, 0)
    words = attribute(_TCA_HTB_PARMS, rate + rate + parameters)
    if bytes_per_s > _U32_MAX:
        large = struct.pack("=Q", bytes_per_s)
        words += attribute(_TCA_HTB_RATE64, large) + attribute(_TCA_HTB_CEIL64, large)
    return words

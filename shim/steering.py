"""Connections to a network namespace's loopback come to sockets of this process, whatever their port is.

A program of the kernel's BPF machine is asked in that namespace which socket a new connection is for, before the ones
that listen there are looked at. It is attached by a descriptor, so it is gone with this process, however that ends; and
nothing of it is seen by other namespaces. No packet filter has a part in it.

It takes connections from 127.0.0.1 to 127.0.0.1, and from ::1 to ::1: from the namespace itself. Other addresses of the
loopback stay as they are: at 127.0.0.11 is Docker's name server. Those that come from a port below 1024 stay as they
are too, which is how this process reaches who listens there (`listener_here`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hypervisor.netns import entered, open_netns
from oci_engine import bpf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BACKLOG = 128
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
# Ports of this process' own connections, as rresvport(3) takes them.
_OWN_PORTS = range(512, 1024)
_PORT_ATTEMPTS = 16
# linux/in.h and linux/in6.h; Python has no names for them.
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78

# linux/bpf.h
_MAP_OF_SOCKETS, _SK_LOOKUP, _ATTACH_SK_LOOKUP = 15, 30, 36
_MAP_LOOKUP, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_FAMILY, _PROTOCOL, _REMOTE_PORT = 8, 12, 36  # of struct bpf_sk_lookup
_ADDRESSES = {socket.AF_INET: (16, 40), socket.AF_INET6: (20, 44)}
_PASS = 1


@contextmanager
def steered(netns: Path) -> Iterator[list[socket.socket]]:
    """Listening, non-blocking sockets, one for each family that the host has, to which connections to the loopback of
    the namespace come during the block. The port that was meant is in their `getsockname`.

    Raises:
        HostUnsupported: the namespace cannot be entered.
        OSError: the kernel has no such programs, or this process may not use them.
    """
    with ExitStack() as undo:
        target = open_netns(netns)
        undo.callback(os.close, target)
        listeners = []
        for family in _LOOPBACK:
            with entered(netns):
                listener = _listening(family)
            if listener is not None:
                undo.enter_context(listener)
                undo.callback(os.close, _attach(family, listener, target))
                listeners.append(listener)
        yield listeners


async def listener_here(netns: Path, family: int, port: int) -> socket.socket | None:
    """A connection to who listens at that port of the namespace itself; None when nobody does. Raises OSError."""
    loop = asyncio.get_running_loop()
    # From that same port TCP would connect us to ourselves.
    own_ports = [own_port for own_port in _OWN_PORTS if own_port != port]
    for own_port in random.sample(own_ports, _PORT_ATTEMPTS):
        with entered(netns):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind((_LOOPBACK[socket.AddressFamily(family)], own_port))
            await loop.sock_connect(sock, (_LOOPBACK[socket.AddressFamily(family)], port))
        except ConnectionRefusedError:
            sock.close()
            return None
        except BaseException as err:
            sock.close()
            if isinstance(err, OSError) and err.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                continue  # taken, also by an earlier connection that has ended
            raise
        return sock
    raise OSError(errno.EADDRINUSE, f"none of {_PORT_ATTEMPTS} ports below 1024 is free")


def why_not() -> str:
    """What keeps this host from it; empty when nothing does."""
    try:
        with ExitStack() as undo:
            sockets = bpf.new_map(_MAP_OF_SOCKETS, 1)
            undo.callback(os.close, sockets)
            undo.callback(os.close, _load(socket.AF_INET, sockets))
    except OSError as err:
        return err.strerror or str(err)
    return ""


def _listening(family: socket.AddressFamily) -> socket.socket | None:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as err:
        if err.errno == errno.EAFNOSUPPORT:  # a kernel that was told to have no IPv6
            return None
        raise
    try:
        # The loopback may not have its address yet.
        if family == socket.AF_INET:
            listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        listener.bind((_LOOPBACK[family], 0))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _attach(family: socket.AddressFamily, listener: socket.socket, netns: int) -> int:
    """A descriptor that keeps the program attached."""
    with ExitStack() as undo:
        sockets = bpf.new_map(_MAP_OF_SOCKETS, 1)
        undo.callback(os.close, sockets)
        bpf.set_entry(sockets, 0, listener.fileno())
        program = _load(family, sockets)
        undo.callback(os.close, program)
        return bpf.link(program, netns, _ATTACH_SK_LOOKUP)


def _load(family: socket.AddressFamily, sockets: int) -> int:
    return bpf.load(assemble(family, sockets), _SK_LOOKUP, _ATTACH_SK_LOOKUP, b"steering")


def assemble(family: socket.AddressFamily, sockets: int) -> bytes:
    """The program: unless all conditions hold it leaves the connection to others, else to the map's only socket."""
    context, chosen, value = bpf.KEPT, bpf.KEPT + 1, bpf.ARGUMENT + 1
    packed = socket.inet_pton(family, _LOOPBACK[family])
    words = [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]
    wanted = [(_PROTOCOL, socket.IPPROTO_TCP), (_FAMILY, family)]
    wanted += [(start + 4 * at, word) for start in _ADDRESSES[family] for at, word in enumerate(words)]
    code: list[bytes | tuple[int, int, int]] = [bpf.instruction(bpf.MOVE_64, context, bpf.ARGUMENT)]
    for place, word in wanted:
        code += [bpf.instruction(bpf.LOAD_WORD, value, context, place), (bpf.IF_NOT_EQUAL, value, word)]
    code += [
        bpf.instruction(bpf.LOAD_HALF, value, context, _REMOTE_PORT),
        bpf.instruction(bpf.TO_BIG_ENDIAN, value, number=16),
        (bpf.IF_LESS_64, value, _OWN_PORTS.stop),
        bpf.instruction(bpf.STORE_WORD, bpf.STACK, offset=-4, number=0),
        *bpf.load_map(bpf.ARGUMENT, sockets),
        bpf.instruction(bpf.MOVE_64, bpf.ARGUMENT + 1, bpf.STACK),
        bpf.instruction(bpf.ADD_64, bpf.ARGUMENT + 1, number=-4),
        bpf.instruction(bpf.CALL, number=_MAP_LOOKUP),
        (bpf.IF_EQUAL_64, bpf.RESULT, 0),
        bpf.instruction(bpf.MOVE_64, chosen, bpf.RESULT),
        bpf.instruction(bpf.MOVE_64, bpf.ARGUMENT, context),
        bpf.instruction(bpf.MOVE_64, bpf.ARGUMENT + 1, chosen),
        bpf.instruction(bpf.MOVE_NUMBER, bpf.ARGUMENT + 2, number=0),
        bpf.instruction(bpf.CALL, number=_SK_ASSIGN),
        bpf.instruction(bpf.MOVE_64, bpf.ARGUMENT, chosen),
        bpf.instruction(bpf.CALL, number=_SK_RELEASE),
    ]
    # Conditions lead to the end, where the connection passes, with or without a socket of ours.
    assembled = [
        step
        if isinstance(step, bytes)
        else bpf.instruction(step[0], step[1], offset=len(code) - at - 1, number=bpf.signed(step[2]))
        for at, step in enumerate(code)
    ]
    return b"".join([*assembled, *bpf.answer(_PASS)])

"""A name server that knows one name's address, by UDP and TCP (RFC 1035)."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hypervisor.netns import entered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME, ADDRESS = "db.kata-py.test", "192.0.2.77"
_TYPE_A = 1
_QUESTION_AT = 12


def question(number: int, name: str = NAME) -> bytes:
    """A question for the IPv4 address of a name."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", _TYPE_A, 1)


def answer_to(asked: bytes) -> bytes:
    """The answer; a question for anything else has one without an address."""
    end = asked.index(b"\0", _QUESTION_AT) + 5
    known = asked[_QUESTION_AT:end] == question(0)[_QUESTION_AT:]
    head = struct.pack("!HHHHHH", struct.unpack_from("!H", asked)[0], 0x8180, 1, known, 0, 0)
    record = struct.pack("!HHHIH", 0xC00C, _TYPE_A, 1, 60, 4) + socket.inet_aton(ADDRESS)
    return head + asked[_QUESTION_AT:end] + (record if known else b"")


@contextmanager
def serving(netns: Path, address: str, port: int = 53) -> Iterator[list[str]]:
    """Such a server in a network namespace; yields how it was asked, in order."""
    asked: list[str] = []
    with ExitStack() as undo:
        with entered(netns):
            udp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            tcp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        udp.bind((address, port))
        tcp.bind((address, port))
        tcp.listen()
        threads = [
            threading.Thread(target=serve, args=(sock, asked))
            for serve, sock in ((_by_udp, udp), (_by_tcp, tcp))
        ]
        for thread in threads:
            thread.start()
        try:
            yield asked
        finally:
            for sock in (udp, tcp):
                _end(sock)
            for thread in threads:
                thread.join()


def _end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected, which a server never is: its waiting thread wakes up all the same
        return


def _by_udp(sock: socket.socket, asked: list[str]) -> None:
    while True:
        message, sender = sock.recvfrom(65535)
        if not message:
            return
        asked.append("udp")
        sock.sendto(answer_to(message), sender)


def _by_tcp(sock: socket.socket, asked: list[str]) -> None:
    while True:
        try:
            connection, _ = sock.accept()
        except OSError:
            return
        with connection, connection.makefile("rwb") as stream:
            while length := stream.read(2):
                message = stream.read(int.from_bytes(length, "big"))
                asked.append("tcp")
                answer = answer_to(message)
                stream.write(len(answer).to_bytes(2, "big") + answer)
                stream.flush()

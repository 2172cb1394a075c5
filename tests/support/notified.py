"""The program at the other end of a filter's listener: answers for system calls of a container (seccomp_unotify(2))."""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp)
_RECV, _SEND = 0xC0502100, 0xC0182101
_NOTIF_BYTES = 80
_PATIENCE_S = 10


class Supervisor:
    """Takes one listener after the other, and fails every system call that it is asked about with ENOTUNIQ."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._states: list[dict[str, Any]] = []
        self._told = threading.Condition()
        self.more: list[bytes] = []
        self.asked: list[int] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen()
        self._stop, self._stopped = os.pipe()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        os.close(self._stopped)
        for thread in self._threads:
            thread.join()
        self._server.close()
        os.close(self._stop)

    def states(self, count: int) -> list[dict[str, Any]]:
        """So many states of processes: what is sent already may not have been read yet."""
        with self._told:
            assert self._told.wait_for(lambda: len(self._states) >= count, timeout=_PATIENCE_S)
            return [*self._states]

    def _ready(self, fd: int) -> bool:
        """Whether there is something to read; no more when this is to end."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._stop)
        return all(number == fd and event & select.POLLIN for number, event in poll.poll())

    def _accept(self) -> None:
        while self._ready(self._server.fileno()):
            connection, _ = self._server.accept()
            with connection:
                text, control, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(16))
                files = array.array("i")
                for _, _, data in control:
                    files.frombytes(data)
                self.more.append(connection.recv(1))  # the end: it is used once
            state = json.loads(text)
            assert len(files) == len(state["fds"])
            with self._told:
                self._states.append(state)
                self._told.notify_all()
            thread = threading.Thread(target=self._answer, args=(files[0],))
            self._threads.append(thread)
            thread.start()

    def _answer(self, listener: int) -> None:
        try:
            while self._ready(listener):
                asked = bytearray(_NOTIF_BYTES)
                fcntl.ioctl(listener, _RECV, asked)
                number, _pid, _flags, call = struct.unpack_from("=QIIi", asked)
                self.asked.append(call)
                answer = struct.pack("=QqiI", number, 0, -errno.ENOTUNIQ, 0)
                fcntl.ioctl(listener, _SEND, bytearray(answer))
        finally:
            os.close(listener)

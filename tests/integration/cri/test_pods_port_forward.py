"""`kubectl port-forward` to programs in the guest: through containerd's streaming server, and as containerd itself does
it for each connection, which is to connect in the pod's network namespace."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor.netns import entered
from shim import record
from tests.integration.containerd import wait_for_end
from tests.integration.cri.client import CriError
from tests.integration.cri.kubelet import eventually
from tests.integration.cri.streams import PORT, PORT_ERROR, Streams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.client import Cri
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20
WEB, DIGEST, ECHO, NOBODY = 8080, 8081, 8082, 9999
END_LIMIT_S = 30.0
# A page of random bytes, and a server that answers with the sum of what it was sent, once that has ended.
SERVE = f"""
mkdir /www; head -c {MIB} /dev/urandom > /www/page; echo small > /www/small
httpd -p 127.0.0.1:{WEB} -h /www
nc -ll -p {ECHO} -e cat &
exec nc -ll -p {DIGEST} -e sha256sum
"""


def serving(pod: Pod) -> str:
    """Runs the servers; returns another container of the pod, to ask in."""
    pod.run("web", ("sh", "-c", SERVE))
    asking = pod.run("asking")

    def all_listen() -> bool:
        there = pod.exec(asking, "cat", "/proc/net/tcp", "/proc/net/tcp6")
        return all(f":{port:04X} " in there for port in (WEB, DIGEST, ECHO))

    eventually(all_listen, "the servers listen")
    return asking


class Inside:
    """A pod's network namespace on the host, which stays for as long as this is open."""

    def __init__(self, pod: Pod) -> None:
        written = record.read(pod.id)
        assert written is not None
        self.shim = written.pid
        self._fd = os.open(f"/proc/{written.helpers['qemu'][0]}/ns/net", os.O_RDONLY)

    def connected(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        """A connection as containerd makes one for each of the client's."""
        with entered(Path(f"/proc/self/fd/{self._fd}")):
            return socket.create_connection((host, port), timeout=60)

    def listening(self) -> socket.socket:
        """A server's socket at the loopback of the host's side."""
        with entered(Path(f"/proc/self/fd/{self._fd}")):
            return socket.create_server(("127.0.0.1", 0))

    def set_up(self) -> None:
        """Lets the namespace have a loopback."""
        with entered(Path(f"/proc/self/fd/{self._fd}")):
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    def close(self) -> None:
        os.close(self._fd)


def page(connection: socket.socket, path: str) -> bytes:
    with connection, connection.makefile("rb") as answer:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return answer.read().partition(b"\r\n\r\n")[2]


def digest(connection: socket.socket, data: bytes) -> str:
    """Of the bytes, by the guest: it answers only once this direction has ended."""
    with connection, connection.makefile("rb") as answer:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return answer.read().decode().partition(" ")[0]


def removed(pod: Pod) -> bool:
    try:
        pod.remove()
    except CriError:
        return False
    return True


@pytest.fixture(scope="module")
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    """One virtual machine for most tests here."""
    with kubelet.pod("ports") as pod:
        yield pod


def echo(connection: socket.socket, data: bytes) -> bytes:
    with connection, connection.makefile("rb") as answer:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return answer.read()


@pytest.fixture(scope="module")
def asking(pod: Pod) -> str:
    """A container beside the servers."""
    return serving(pod)


@pytest.fixture
def inside(pod: Pod) -> Iterator[Inside]:
    with ExitStack() as undo:
        inside = Inside(pod)
        undo.callback(inside.close)
        yield inside


@pytest.mark.usefixtures("asking")
def test_a_client_of_kubernetes_gets_the_page(cri: Cri, pod: Pod) -> None:
    with Streams(cri.port_forward_url(pod.id, WEB)) as streams:
        streams.send(b"GET /small HTTP/1.0\r\n\r\n")
        answer = streams.wait_for(b"small\n", PORT)
    assert answer.count(b" 200 OK") == answer.count(b"small\n") == 1


def test_a_client_of_kubernetes_is_told_of_a_port_where_nobody_listens(cri: Cri, pod: Pod) -> None:
    with Streams(cri.port_forward_url(pod.id, NOBODY)) as streams:
        streams.wait_for(b"connection reset by peer", PORT_ERROR)
    assert str(NOBODY).encode() in streams.received[PORT_ERROR]


def test_a_megabyte_each_way_and_the_end_of_one(pod: Pod, asking: str, inside: Inside) -> None:
    expected = pod.exec(asking, "wget", "-q", "-O", "-", f"http://127.0.0.1:{WEB}/small")
    assert page(inside.connected(WEB), "/small").decode() == expected
    there = page(inside.connected(WEB), "/page")
    assert len(there) == MIB
    data = os.urandom(MIB)
    assert digest(inside.connected(DIGEST), data) == hashlib.sha256(data).hexdigest()
    assert digest(inside.connected(DIGEST), there) == hashlib.sha256(there).hexdigest()


@pytest.mark.usefixtures("asking")
def test_twenty_at_once(inside: Inside) -> None:
    connections = []
    for _ in range(20):
        connections.append(inside.connected(ECHO))
        connections[-1].sendall(b"?")
        # busybox resets some of those that come while it takes another.
        assert connections[-1].recv(1) == b"?"
    all_data = [os.urandom(30_000) for _ in connections]
    with ThreadPoolExecutor(len(all_data)) as threads:
        assert list(threads.map(echo, connections, all_data)) == all_data


def test_what_listens_only_at_the_other_family_is_found(pod: Pod, asking: str, inside: Inside) -> None:
    port = 8083
    pod.exec(asking, "sh", "-c", f"mkdir -p /six; echo six > /six/page; httpd -p [::1]:{port} -h /six")
    assert page(inside.connected(port), "/page") == b"six\n"
    assert page(inside.connected(WEB, "::1"), "/small") == b"small\n"


def test_who_listens_in_the_namespace_itself_comes_first(inside: Inside) -> None:
    with inside.listening() as server:
        client = inside.connected(server.getsockname()[1])
        server.settimeout(60)
        accepted, _ = server.accept()
        with accepted:
            assert conversation(client, accepted) == b"ping pong"


def conversation(client: socket.socket, server: socket.socket) -> bytes:
    with client:
        client.sendall(b"ping")
        client.shutdown(socket.SHUT_WR)
        asked = server.makefile("rb").read()
        server.sendall(asked + b" pong")
        server.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


def test_nobody_listens_there(inside: Inside) -> None:
    with inside.connected(NOBODY) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    # Other addresses of the loopback are not taken.
    with pytest.raises(ConnectionRefusedError):
        inside.connected(WEB, "127.0.0.2")


def test_it_ends_with_the_pod(kubelet: Kubelet) -> None:
    with ExitStack() as undo:
        pod = kubelet.run_pod("ending")
        inside = Inside(pod)
        undo.callback(inside.close)
        serving(pod)
        open_one = undo.enter_context(inside.connected(DIGEST))
        pod.remove()
        wait_for_end([inside.shim], END_LIMIT_S)
        with suppress(ConnectionResetError):
            assert open_one.recv(1) == b""
        inside.set_up()  # which containerd has undone
        with pytest.raises(ConnectionRefusedError):
            inside.connected(WEB)


def test_it_ends_with_a_shim_that_is_killed(kubelet: Kubelet) -> None:
    with ExitStack() as undo:
        pod = kubelet.run_pod("killed")
        # containerd learns of it at some time, and keeps the pod until then.
        undo.callback(eventually, lambda: removed(pod), "the pod is removed")
        inside = Inside(pod)
        undo.callback(inside.close)
        with inside.connected(NOBODY) as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
        os.kill(inside.shim, signal.SIGKILL)
        wait_for_end([inside.shim], END_LIMIT_S)
        with pytest.raises(ConnectionRefusedError):
            inside.connected(WEB)

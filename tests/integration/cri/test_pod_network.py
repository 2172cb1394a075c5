"""Pods with the network that real CNI plugins make for them."""

from __future__ import annotations

import hashlib
import os
import socket
from typing import TYPE_CHECKING

from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import eventually

if TYPE_CHECKING:
    from tests.integration.cri.client import Cri
    from tests.integration.cri.kubelet import Kubelet, Pod

GATEWAY = "10.213.0.1"
HOST_PORT = 18080


def address(cri: Cri, pod: Pod) -> str:
    return str(cri.pod_status(pod.id).network.ip)


def test_pods_reach_each_other_and_the_host(cri: Cri, kubelet: Kubelet) -> None:
    serve = "mkdir /www; echo of the other pod > /www/page; exec httpd -f -p 8080 -h /www"
    mapping = pb.PortMapping(container_port=8080, host_port=HOST_PORT)
    with kubelet.pod("server", port_mappings=[mapping]) as server, kubelet.pod("client") as client:
        server.run("web", ("sh", "-c", serve))
        asking = client.run("asking")
        here, there = address(cri, client), address(cri, server)
        assert f"inet {here}/24" in client.exec(asking, "ip", "address", "show", "eth0")
        assert f"default via {GATEWAY} dev eth0" in client.exec(asking, "ip", "route")
        url = f"http://{there}:8080/page"
        eventually(
            lambda: cri.exec(asking, ("wget", "-q", "-O", "-", url)).stdout == b"of the other pod\n",
            "the other pod's page",
        )
        with socket.create_connection((there, 8080), timeout=60) as connection:
            connection.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            assert connection.makefile("rb").read().endswith(b"of the other pod\n")
        with socket.create_connection((GATEWAY, HOST_PORT), timeout=60) as connection:  # hostPort
            connection.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            assert connection.makefile("rb").read().endswith(b"of the other pod\n")
        with socket.create_server((GATEWAY, 0)) as listener:
            port = listener.getsockname()[1]
            data = os.urandom(1 << 20)
            told = client.run("telling", ("sh", "-c", f"nc {GATEWAY} {port} | sha256sum; sleep 1000"))
            listener.settimeout(60)
            connection, peer = listener.accept()
            with connection:
                assert peer[0] == here
                connection.sendall(data)
            eventually(lambda: " " in client.output("telling"), "the sum of what the host sent")
            assert client.output("telling").split()[0] == hashlib.sha256(data).hexdigest()
            cri.stop(told)


def test_containers_of_a_pod_share_its_network(kubelet: Kubelet) -> None:
    with kubelet.pod("shared") as pod:
        pod.run("web", ("sh", "-c", "mkdir /www; echo local > /www/page; exec httpd -f -p 8080 -h /www"))
        asking = pod.run("asking")
        eventually(
            lambda: (
                pod.cri.exec(asking, ("wget", "-q", "-O", "-", "http://127.0.0.1:8080/page")).stdout
                == b"local\n"
            ),
            "the page of the container beside",
        )

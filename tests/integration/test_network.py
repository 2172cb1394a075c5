"""The pod's network in the guest: interfaces that were there before it, that come later, that change and go."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import cni, host, vhost_user_server
from tests.support.name_server import ADDRESS, NAME, answer_to, question, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

HOST, GUEST = "10.214.0.1", "10.214.0.2"
HOST6, GUEST6 = "fd14::1", "fd14::2"
# An emulated guest on a busy machine takes its time; what is waited for comes at once elsewhere.
SEEN_TIMEOUT_S = 60.0
POLL_PAUSE_S = 0.05
SLEEP = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done")
ROUNDS = 20
# Bits per second, and the bytes that are let through at once.
RATE, BURST_BYTES = 4_000_000, 65536
SENT_BYTES = 1 << 20
# What Docker's and nerdctl's hooks do: the network namespace is found by the process of the state.
HOOK = """\
#!/bin/sh -e
pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/')
ip link add {outer} type veth peer name eth0 netns $pid
ip address add 10.214.0.1/24 dev {outer}
ip link set {outer} up
nsenter -t $pid -n ip address add 10.214.0.2/24 dev eth0
nsenter -t $pid -n ip link set eth0 up
nsenter -t $pid -n ip route add default via 10.214.0.1
"""


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


@dataclass
class Namespace:
    """A network namespace of the test's own; `name` is also part of the names of the host's ends of its cables."""

    name: str
    cables: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def ip(self, words: str) -> str:
        return ip(f"-n {self.name} {words}")

    def cable(self, inner: str, mac: str) -> str:
        """An interface in the namespace whose other end is on the host; returns the name of that."""
        outer = f"{self.name}{len(self.cables)}"
        self.cables.append(outer)
        ip(f"link add {outer} type veth peer name {inner} address {mac} netns {self.name}")
        ip(f"link set {outer} up")
        return outer

    def received_bytes(self) -> int:
        """What has come out of the namespace by its first cable."""
        return int(Path(f"/sys/class/net/{self.cables[0]}/statistics/rx_bytes").read_text())

    def queues(self) -> list[str]:
        """The interfaces of the namespace whose incoming packets traffic control looks at."""
        shown = subprocess.run(
            ["tc", "-n", self.name, "qdisc", "show"], check=True, capture_output=True, text=True
        )
        return sorted(line.split()[4] for line in shown.stdout.splitlines() if line.split()[1] == "ingress")

    def limits(self) -> int:
        """How many interfaces of the namespace have a limit to what they send."""
        shown = subprocess.run(
            ["tc", "-n", self.name, "qdisc", "show"], check=True, capture_output=True, text=True
        )
        return sum(line.split()[1] == "htb" for line in shown.stdout.splitlines())

    def of_kind(self, kind: str) -> list[str]:
        """The interfaces of a kind."""
        return self.ip(f"-br link show type {kind}").splitlines()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    found = Namespace(f"kp{secrets.token_hex(3)}")
    ip(f"netns add {found.name}")
    yield found
    left = found.queues(), [line.split()[0] for line in found.ip("-br link").splitlines() if "_kata" in line]
    ip(f"netns delete {found.name}")
    for cable in found.cables:  # those that a test has not removed
        subprocess.run(["ip", "link", "delete", cable], check=False, capture_output=True)
    assert left == ([], [])


@pytest.fixture
def wired(namespace: Namespace) -> Namespace:
    """A namespace as a CNI plugin leaves it: eth0 with IPv4 and IPv6 addresses and routes over the host."""
    outer = namespace.cable("eth0", "0a:58:0a:d6:00:02")
    ip(f"address add {HOST}/24 dev {outer}")
    ip(f"address add {HOST6}/64 dev {outer} nodad")
    ip(f"link set {outer} mtu 1450")
    for words in (
        "link set lo up",
        "link set eth0 mtu 1450 up",
        f"address add {GUEST}/24 dev eth0",
        f"address add {GUEST6}/64 dev eth0 nodad",
        f"route add default via {HOST}",
        f"route add 10.99.0.0/16 via {HOST}",
        f"-6 route add default via {HOST6}",
        "neighbour add 10.214.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
    ):
        namespace.ip(words)
    return namespace


@contextmanager
def web_server(folder: Path, address: str) -> Iterator[int]:
    """A web server of this host; yields its port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """The test's output is for the test."""

    with http.server.ThreadingHTTPServer((address, 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def in_guest(containerd: Containerd, container: str, *command: str) -> str:
    """Standard output of a command in the container."""
    done = containerd.exec(container, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(containerd: Containerd, container: str, condition: str) -> None:
    """Until a condition of the guest's shell holds, asked for in the guest."""
    loop = (
        f"i=0; until {condition}; do i=$((i+1)); [ $i -lt 300 ] || {{ ip address; exit 1; }}; sleep 0.1; done"
    )
    done = containerd.exec(container, "sh", "-c", loop, timeout_s=SEEN_TIMEOUT_S)
    assert done.returncode == 0, f"{condition}\n{done.stdout}"


def test_the_network_that_a_pod_was_given(containerd: Containerd, wired: Namespace, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(os.urandom(1 << 20))
    container = containerd.start(
        "sh",
        *("-c", "mkdir /www; echo of the guest > /www/page; exec httpd -f -p 8080 -h /www"),
        options=["--with-ns", f"network:{wired.path}"],
    )
    seen = in_guest(containerd, container, "ip", "address", "show", "eth0")
    assert "mtu 1450" in seen
    for word in ("0a:58:0a:d6:00:02", f"{GUEST}/24", f"{GUEST6}/64", "UP"):
        assert word in seen
    (line,) = [line for line in seen.splitlines() if GUEST6 in line]
    assert "tentative" not in line  # usable from the first moment
    assert "127.0.0.1/8" in in_guest(containerd, container, "ip", "address", "show", "lo")
    routes = in_guest(containerd, container, "ip", "route")
    assert f"default via {HOST} dev eth0" in routes
    assert f"10.99.0.0/16 via {HOST} dev eth0" in routes
    assert f"default via {HOST6} dev eth0" in in_guest(containerd, container, "ip", "-6", "route")
    assert "02:00:00:00:00:09" in in_guest(containerd, container, "ip", "neigh")
    with web_server(tmp_path, HOST) as port:
        fetched = f"wget -q -O - http://{HOST}:{port}/page | wc -c"
        assert in_guest(containerd, container, "sh", "-c", fetched).split() == [str(1 << 20)]
    in_guest(containerd, container, "ping", "-c", "1", "-W", "10", HOST6)
    wait_for(containerd, container, "wget -q -O - http://127.0.0.1:8080/page | grep -q guest")
    with urllib.request.urlopen(f"http://{GUEST}:8080/page", timeout=SEEN_TIMEOUT_S) as answer:
        assert answer.read() == b"of the guest\n"
    eth0, tap = wired.queues()
    assert eth0 == "eth0"
    assert re.fullmatch("tap[0-9]+_kata", tap)
    containerd.remove(container)


def test_interfaces_of_many_kinds(containerd: Containerd, namespace: Namespace) -> None:
    outer = namespace.cable("net0", "0a:58:0a:d6:00:10")
    ip(
        f"link add link {outer} name mac1 netns {namespace.name} address 0a:58:0a:d6:00:11 type macvlan mode bridge"
    )
    namespace.cable("net2", "0a:58:0a:d6:00:12")
    namespace.ip("link add name br3 address 0a:58:0a:d6:00:13 type bridge")
    namespace.ip("link add name down4 address 0a:58:0a:d6:00:14 type bridge")
    names = ("net0", "mac1", "net2", "br3")
    for number, name in enumerate(names):
        namespace.ip(f"address add 10.{100 + number}.0.2/24 dev {name}")
        namespace.ip(f"link set {name} up")
    done = containerd.run(
        *("sh", "-c", "ip -o link; ip -o -4 address"),
        options=["--rm", "--with-ns", f"network:{namespace.path}"],
    )
    assert done.returncode == 0, done.stderr
    for number, name in enumerate(names):
        assert re.search(rf"{name}: .*0a:58:0a:d6:00:1{number}", done.stdout), done.stdout
        assert re.search(rf"{name} +inet 10\.{100 + number}\.0\.2/24", done.stdout), done.stdout
    assert "down4" not in done.stdout


def test_an_interface_that_no_guest_can_have_is_named(containerd: Containerd, namespace: Namespace) -> None:
    namespace.ip("tuntap add tun0 mode tun")
    namespace.ip("link set tun0 up")
    done = containerd.run(
        "true", container=(name := containerd.new_id()), options=["--with-ns", f"network:{namespace.path}"]
    )
    containerd.ctr("containers", "rm", name)
    assert done.returncode != 0
    assert "interface tun0 of the pod (tun) has no MAC address" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_namespace_that_is_not_there(containerd: Containerd) -> None:
    done = containerd.run(
        "true", container=(name := containerd.new_id()), options=["--with-ns", "network:/run/netns/nowhere"]
    )
    containerd.ctr("containers", "rm", name)
    assert done.returncode != 0
    assert "cannot open network namespace /run/netns/nowhere: No such file or directory" in done.stderr


@pytest.mark.usefixtures("restored_configuration")
def test_no_network_on_request(containerd: Containerd, wired: Namespace) -> None:
    with containerd.config.open("a") as file:
        file.write('\n[runtime]\ninternetworking_model = "none"\n')
    done = containerd.run("ls", "/sys/class/net", options=["--rm", "--with-ns", f"network:{wired.path}"])
    assert done.stdout.split() == ["lo"]


@pytest.mark.usefixtures("restored_configuration")
@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
def test_models_and_rates(containerd: Containerd, wired: Namespace, tmp_path: Path, model: str) -> None:
    """Both ways to join interfaces carry packets in both directions, and no faster than allowed."""
    rates = f"rx_rate_limiter_max_rate = {RATE}\ntx_rate_limiter_max_rate = {RATE}\n"
    text = containerd.config.read_text().replace("[hypervisor.qemu]\n", f"[hypervisor.qemu]\n{rates}")
    containerd.config.write_text(f'{text}\n[runtime]\ninternetworking_model = "{model}"\n')
    (tmp_path / "page").write_bytes(os.urandom(SENT_BYTES))
    serve = ("sh", "-c", "mkdir /www; exec httpd -f -p 8080 -h /www")
    container = containerd.start(*serve, options=["--with-ns", f"network:{wired.path}"])
    assert f"{GUEST}/24" in in_guest(containerd, container, "ip", "address", "show", "eth0")
    # What may be sent at once does not wait; packets' headers and a slow guest only make it longer.
    shortest_s = 0.8 * (SENT_BYTES - BURST_BYTES) * 8 / RATE
    with web_server(tmp_path, HOST) as port:
        began = time.monotonic()
        in_guest(containerd, container, "wget", "-q", "-O", "/www/page", f"http://{HOST}:{port}/page")
        assert time.monotonic() - began > shortest_s
    began = time.monotonic()
    with urllib.request.urlopen(f"http://{GUEST}:8080/page", timeout=SEEN_TIMEOUT_S) as answer:
        assert answer.read() == (tmp_path / "page").read_bytes()
    assert time.monotonic() - began > shortest_s
    assert len(wired.of_kind("macvtap")) == (model == "macvtap")
    assert wired.limits() == 2
    containerd.remove(container)
    assert wired.limits() == 0


@dataclass(frozen=True)
class Second:
    """A network beside the first, by real CNI plugins. FAR is an address of this host that is in none of the networks:
    what the guest sends there goes by a default route."""

    chain: cni.Chain
    bridge: str

    GUEST, GATEWAY, GUEST6, FAR = "10.217.0.2", "10.217.0.1", "fd17::2", "198.18.17.1"

    def received_bytes(self) -> int:
        """What has come from the pod by this network."""
        return int(Path(f"/sys/class/net/{self.bridge}/statistics/rx_bytes").read_text())


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Second]:
    bridge = f"kp{secrets.token_hex(3)}br"
    chain = cni.second_network(bridge, bridge, tmp_path / "cni", ipv4="10.217.0.0/24", ipv6="fd17::/64")
    ip(f"address add {Second.FAR}/32 dev lo")
    yield Second(chain, bridge)
    ip(f"address delete {Second.FAR}/32 dev lo")
    subprocess.run(
        ["ip", "link", "delete", bridge], check=False, capture_output=True
    )  # if the plugin has made it


def test_a_second_network_with_tables_of_its_own(
    containerd: Containerd, wired: Namespace, second: Second, tmp_path: Path
) -> None:
    """What comes by the second interface is answered by it, and not by the first one's default route."""
    second.chain.add(wired.path, "net1")
    wired.ip("-6 route add prohibit fd99::/48")
    wired.ip("route add 10.97.0.0/16 via 10.214.0.3 metric 7")
    wired.ip("route add 10.96.0.0/16 nexthop via 10.214.0.3 weight 2 nexthop via 10.214.0.4")
    page = os.urandom(1 << 20)
    (tmp_path / "page").write_bytes(page)
    mount = f"type=bind,src={tmp_path},dst=/www,options=rbind:ro"
    container = containerd.start(
        *("httpd", "-f", "-p", "8080", "-h", "/www"),
        options=["--mount", mount, "--with-ns", f"network:{wired.path}"],
    )

    def seen(words: str) -> str:
        return in_guest(containerd, container, "ip", *words.split())

    assert f"from {Second.GUEST} lookup 100" in seen("rule")
    assert f"from {Second.GUEST6} lookup 101" in seen("-6 rule")
    assert f"default via {Second.GATEWAY} dev net1" in seen("route show table 100")
    assert f"10.217.0.0/24 dev net1 scope link  src {Second.GUEST}" in seen("route show table 100")
    # busybox shows tables of IPv6 only with all others.
    assert "default via fd17::1 dev net1 table 101" in seen("-6 route show table all")
    main = seen("-4 route show table main")
    assert f"default via {HOST} dev eth0" in main
    assert "net1" not in main  # the plugin has moved what the kernel made, also out of this table
    assert "10.97.0.0/16 via 10.214.0.3 dev eth0  metric 7" in main
    assert "10.96.0.0/16" in main
    assert "fd99::/48" in seen("-6 route show table main")
    refused = containerd.exec(container, "ping", "-c", "1", "-W", "1", "fd99::1")
    assert "Permission denied" in refused.stderr

    began, first = second.received_bytes(), wired.received_bytes()
    connection = http.client.HTTPConnection(
        Second.GUEST, 8080, SEEN_TIMEOUT_S, source_address=(Second.FAR, 0)
    )
    connection.request("GET", "/page")
    assert connection.getresponse().read() == page
    connection.close()
    assert second.received_bytes() - began > len(page)
    assert wired.received_bytes() - first < len(page) / 10

    for change, condition in (
        ("route replace default via 10.217.0.9 dev net1 table 100",
         "ip route show table 100 | grep -q 10.217.0.9"),
        ("rule add fwmark 7 lookup 102 priority 900", "ip rule | grep -q '^900:.*fwmark 0x7 lookup 102'"),
        ("route add default via 10.214.0.5 table 102", "ip route show table 102 | grep -q 10.214.0.5"),
        ("rule delete fwmark 7", "! ip rule | grep -q fwmark"),
        ("route flush table 102", "! ip route show table 102 | grep -q ."),
        ("-6 route delete prohibit fd99::/48", "! ip -6 route | grep -q fd99"),
        ("neighbour delete 10.214.0.9 dev eth0", "! ip neigh | grep -q 02:00:00:00:00:09"),
        ("address change 10.214.0.2/24 dev eth0 preferred_lft 0", "ip address show eth0 | grep -q deprecated"),
    ):  # fmt: skip
        wired.ip(change)
        wait_for(containerd, container, condition)
    second.chain.delete(wired.path, "net1")
    wait_for(containerd, container, "! test -e /sys/class/net/net1")
    wait_for(containerd, container, "! { ip rule; ip -6 rule; } | grep -q 'lookup 10[01]'")
    assert not seen("route show table 100").strip()
    containerd.remove(container)


@pytest.mark.timeout(600)
def test_interfaces_come_change_and_go(containerd: Containerd) -> None:
    """As with Docker and nerdctl: the namespace is empty at first, and found by the task's process."""
    container = containerd.start(*SLEEP)
    (line,) = [line for line in containerd.checked("tasks", "ls").splitlines() if container in line]
    inside = f"-t {line.split()[1]} -n ip"
    outer = f"kp{secrets.token_hex(3)}"

    def there(words: str) -> None:
        subprocess.run(["nsenter", *inside.split(), *words.split()], check=True)

    for number in range(ROUNDS):
        mac = f"0a:58:0a:d6:01:{number:02x}"
        ip(f"link add {outer} type veth peer name eth0 address {mac} netns {line.split()[1]}")
        try:
            ip(f"address add {HOST}/24 dev {outer}")
            ip(f"link set {outer} up")
            there(f"address add {GUEST}/24 dev eth0")
            there("link set eth0 up")
            there(f"route add default via {HOST}")
            there(f"route add 10.97.0.0/16 via {HOST} table 100")
            there(f"rule add from {GUEST} lookup 100")
            wait_for(containerd, container, f"ip route | grep -q 'default via {HOST} dev eth0'")
            wait_for(containerd, container, f"ip rule | grep -q 'from {GUEST} lookup 100'")
            wait_for(containerd, container, "ip route show table 100 | grep -q 10.97.0.0/16")
            if number == 0:
                assert mac in in_guest(containerd, container, "ip", "link", "show", "eth0")
                in_guest(containerd, container, "ping", "-c", "1", "-W", "10", HOST)
                there("address add 10.214.0.77/24 dev eth0")
                there("link set eth0 mtu 1400")
                there("route add 10.98.0.0/16 via 10.214.0.3")
                wait_for(containerd, container, "ip route | grep -q '10.98.0.0/16 via 10.214.0.3'")
                wait_for(containerd, container, "ip address show eth0 | grep -q 10.214.0.77/24")
                wait_for(containerd, container, "ip link show eth0 | grep -q 'mtu 1400'")
                there("route delete 10.98.0.0/16")
                wait_for(containerd, container, "! ip route | grep -q 10.98.0.0/16")
                there(f"address delete {GUEST}/24 dev eth0")
                wait_for(containerd, container, f"! ip address show eth0 | grep -q {GUEST}/24")
            there(f"rule delete from {GUEST} lookup 100")
        finally:
            ip(f"link delete {outer}")
        wait_for(containerd, container, "! test -e /sys/class/net/eth0")
        wait_for(containerd, container, "! ip rule | grep -q 'lookup 100'")
        wait_for(containerd, container, "! ip route show table all | grep -v 'table local' | grep -q .")
    links = subprocess.run(
        ["nsenter", *inside.split(), "-br", "link"], check=True, capture_output=True, text=True
    )
    assert [entry.split()[0] for entry in links.stdout.splitlines()] == ["lo"]
    containerd.remove(container)


def test_hooks_bring_the_network(containerd: Containerd, tmp_path: Path) -> None:
    """A container's own hook makes its network before there is a container, which then has it from its first moment."""
    outer, root = f"kp{secrets.token_hex(3)}", tmp_path / "root"
    root.mkdir()
    hook = tmp_path / "hook"
    hook.write_text(HOOK.format(outer=outer))
    hook.chmod(0o755)
    spec = json.loads(containerd.checked("oci", "spec"))
    spec["root"] = {"path": str(root), "readonly": False}
    script = "ls /started; ip -4 address show eth0; ip route"
    spec["process"] |= {"terminal": False, "args": ["sh", "-c", script], "env": ["PATH=/bin:/sbin"]}
    spec["hooks"] = {
        "createRuntime": [{"path": str(hook)}],
        "startContainer": [{"path": "/bin/touch", "args": ["touch", "/started"]}],
        "poststop": [{"path": "/sbin/ip", "args": ["ip", "link", "delete", outer]}],
    }
    (tmp_path / "config.json").write_text(json.dumps(spec))
    containerd.checked(
        "images", "mount", "--rw", "--snapshotter", containerd.snapshotter, containerd.image, str(root)
    )
    try:
        done = containerd.ctr(
            *("run", "--rm", *containerd.server.fifo_options(), "--runtime", containerd.runtime),
            *("--config", str(tmp_path / "config.json"), containerd.new_id()),
        )
    finally:
        containerd.checked("images", "unmount", "--rm", str(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/started\n")
    assert f"inet {GUEST}/24" in done.stdout
    assert f"default via {HOST} dev eth0" in done.stdout
    assert outer not in ip("-br link")


def test_dockers_name_server(containerd: Containerd, wired: Namespace, tmp_path: Path) -> None:
    """It is there only in the namespace on the host; the guest has it at the same address."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.11\noptions ndots:0\n")
    mount = f"type=bind,src={tmp_path}/resolv.conf,dst=/etc/resolv.conf,options=rbind:ro"
    asked_by_hand = question(7)
    octal = "".join(f"\\{byte:03o}" for byte in len(asked_by_hand).to_bytes(2, "big") + asked_by_hand)
    script = f"nslookup {NAME}; printf '{octal}' | nc 127.0.0.11 53 | hexdump -v -e '1/1 \"%02x\"'"
    with serving(Path(wired.path), "127.0.0.11") as asked:
        done = containerd.run(
            *("sh", "-c", script), options=["--rm", "--mount", mount, "--with-ns", f"network:{wired.path}"]
        )
        assert done.returncode == 0, done.stderr
        assert f"Name:\t{NAME}\nAddress: {ADDRESS}" in done.stdout
        answer = answer_to(asked_by_hand)
        assert done.stdout.endswith(len(answer).to_bytes(2, "big").hex() + answer.hex())
        assert set(asked) == {"udp", "tcp"}


@pytest.mark.usefixtures("restored_configuration")
def test_a_network_out_of_a_file(containerd: Containerd, wired: Namespace, tmp_path: Path) -> None:
    """A tap and a vhost-user server that are there already; the namespace's own interface is not the guest's."""
    with containerd.config.open("a") as file:
        file.write(f'\n[runtime]\ndan_conf = "{tmp_path}"\n')
    wired.ip("tuntap add given mode tap vnet_hdr")
    wired.ip("address add 10.215.0.1/24 dev given")
    wired.ip("link set given up")
    container, options = containerd.new_id(), ["--rm", "--with-ns", f"network:{wired.path}"]
    server = tmp_path / "port.sock"
    devices = [
        {
            "name": "lan0",
            "guest_mac": "0a:58:0a:d7:00:02",
            "device": {"type": "host-tap", "tap_name": "given"},
            "network_info": {
                "interface": {"ip_addresses": ["10.215.0.2/24"], "mtu": 1400},
                "routes": [{"gateway": "10.215.0.1"}],
            },
        },
        {
            "name": "lan1",
            "guest_mac": "0a:58:0a:d7:00:03",
            "device": {"type": "vhost-user", "path": str(server), "queue_size": 1024},
            "network_info": {"interface": {"ip_addresses": ["10.216.0.2/24"]}},
        },
    ]
    described = tmp_path / f"{container}.json"
    script = "ip link; ip -4 address; ip route; ping -c 1 -W 10 10.215.0.1"
    for problem in (f"there is no socket {server}; the server", "there is no tap gone in the machine's"):
        described.write_text(
            json.dumps({"devices": devices}).replace('"given"', '"gone"' if "gone" in problem else '"given"')
        )
        done = containerd.run("true", container=container, options=options)
        assert done.returncode != 0
        assert problem in done.stderr
        containerd.ctr("containers", "rm", container)
    described.write_text(json.dumps({"devices": devices}))
    with vhost_user_server.serving(server) as asked:
        done = containerd.run("sh", "-c", script, container=container, options=options)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert re.search(r"lan0: .*mtu 1400.*\n +link/ether 0a:58:0a:d7:00:02", done.stdout)
    assert re.search(r"lan1: .*mtu 1500.*\n +link/ether 0a:58:0a:d7:00:03", done.stdout)
    for words in ("10.215.0.2/24", "10.216.0.2/24", "default via 10.215.0.1 dev lan0"):
        assert words in done.stdout
    assert "eth0" not in done.stdout
    # The guest's driver has got as far as to use the queues.
    assert vhost_user_server.SET_VRING_KICK in asked
    assert "given" in wired.ip("-br link")


def test_a_killed_shim_leaves_nothing_on_the_pods_interface(containerd: Containerd, wired: Namespace) -> None:
    container = containerd.start(*SLEEP, options=["--with-ns", f"network:{wired.path}"])
    assert wired.queues()
    shim = host.helper(os.getpid(), "containerd-shim-kata-py-v2")
    os.kill(shim, signal.SIGKILL)
    # containerd lets go of the container before it has run the shim's clean-up.
    deadline = time.monotonic() + SEEN_TIMEOUT_S
    while wired.queues():
        assert time.monotonic() < deadline, wired.queues()
        time.sleep(POLL_PAUSE_S)
    containerd.remove(container)

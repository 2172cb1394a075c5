"""What kata-py has to do on a host that most of its users have: systemd, cgroup v2, KVM, vhost, device mapper.

The machine runs this project's other tests, a module at a time, and its programs.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import dev_config
import pytest

from tests.node.machine import REPOSITORY, Node

if TYPE_CHECKING:
    from tests.node.machine import Done

LIMIT_S = 840
PYTHON = REPOSITORY / ".venv" / "bin" / "python"
#: Of the machine's own.
CONFIG, TEMPORARY = "/tmp/configuration.toml", "/tmp/of-tests"
#: Of a failed test's output this much is shown; the rest is above it.
TAIL_LINES = 150


def run_tests(node: Node, *words: str) -> None:
    """Runs pytest in the machine; fails with its output unless tests have run, and none has failed or was skipped."""
    # Of numbered folders, which pytest makes by itself, it stumbles over the fourth: a warning, which is an error here.
    options = [
        "-p",
        "tests.node.patience",
        "-p",
        "no:cacheprovider",
        f"--basetemp={TEMPORARY}",
        "--tb=short",
        "-q",
    ]
    done = node.run(PYTHON, "-m", "pytest", *options, *words, limit_s=LIMIT_S, show=True)
    assert done.status == 0, tail(done)


def tail(done: Done) -> str:
    return "\n".join([f"status {done.status}", *done.output.splitlines()[-TAIL_LINES:]])


def test_the_machine_is_what_others_lack(node: Node) -> None:
    """Else the rest would prove nothing."""
    assert node.run("cat", "/proc/1/comm").output == "systemd\n"
    assert node.run("stat", "-f", "-c", "%T", "/sys/fs/cgroup").output == "cgroup2fs\n"
    assert {"cpuset", "cpu", "io", "memory", "pids", "rdma"} <= {
        *node.run("cat", "/sys/fs/cgroup/cgroup.controllers").output.split()
    }
    devices = ("/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net", "/dev/mapper/control")
    assert node.run("ls", *devices).status == 0
    failed = node.run("systemctl", "--failed", "--plain", "--no-legend").output
    assert failed == ""


@pytest.mark.parametrize(
    ("module", "which"),
    # Where the host has a part in it; long series and dockerd take minutes where all is emulated.
    [
        ("test_agent_engine", ""),
        ("test_engine_life", "not hundred"),
        ("test_engine_process", ""),
        ("test_engine_rootfs", ""),
        ("test_engine_users", ""),
        ("test_runk_podman", ""),
        ("test_runk_program", ""),
        ("test_runk_rootless", ""),
        ("test_runk_systemd", ""),
    ],
)
def test_containers(node: Node, module: str, which: str) -> None:
    """The engine and runk, with systemd, and with version 2 of control groups alone."""
    run_tests(node, f"tests/containers/{module}.py", "-k", which)


def test_the_shim_alone(node: Node) -> None:
    """Where it answers in the words of version 2, and ends what is in control groups."""
    run_tests(node, "tests/process", "-k", "test_stats or test_metrics or test_update or test_shim_is_killed")


def test_what_netlink_asks_of_the_kernel(node: Node) -> None:
    run_tests(node, "tests/unit/netlink/test_netlink_kernel.py", "tests/unit/shim/test_shim_network.py")


def test_what_port_forward_asks_of_the_kernel(node: Node) -> None:
    run_tests(node, "tests/unit/shim/test_shim_port_forward.py")


@pytest.mark.parametrize(
    ("module", "which"),
    [
        ("test_kernels_devices", ""),
        ("test_containers_cgroup", ""),
        ("test_network_kinds", ""),
        ("test_devmapper", ""),
    ],
)
def test_sandboxes(node: Node, module: str, which: str) -> None:
    """Guests of guests, by a containerd that runs in the machine. Each takes a quarter of a minute to start."""
    run_tests(node, f"tests/integration/{module}.py", "-k", which)


def test_check_tells_what_is_there(node: Node) -> None:
    config = dev_config.render(REPOSITORY / "build" / "guest", writer="tests/node")
    script = f"cat > {CONFIG} <<'END'\n{config}\nEND\nexec kata-py check --config {CONFIG}"
    path = f"{REPOSITORY / 'build' / 'bin'}:{os.environ['PATH']}"
    done = node.run("sh", "-c", script, environment={"PATH": path})
    assert done.status == 0, done.output
    said = {tuple(re.split(r"\s{2,}", line)) for line in done.output.splitlines()}
    assert said >= {
        ("ok", "acceleration", "kvm"),
        ("ok", "vsock", "vhost"),
        ("ok", "network", "packets are carried by the kernel (vhost-net)"),
        ("ok", "port-forward", "reaches guests"),
        ("ok", "control groups", "version 2"),
    }, done.output
    assert not re.search("^(missing|warning)", done.output, re.MULTILINE), done.output

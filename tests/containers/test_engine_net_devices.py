"""Interfaces of the host that a container gets (`linux.netDevices`)."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from oci_engine.errors import HookFailed, SpecError
from tests.support.containers import spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.containers import Containers, Spec


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def link() -> Iterator[str]:
    """One end of a cable, with addresses; the other end stays here."""
    name = f"kpe{os.getpid()}"
    ip(f"link add {name}a type veth peer name {name}b")
    try:
        ip(f"link set {name}b up")
        ip(f"link set {name}a up")
        ip(f"addr add 10.9.8.7/24 dev {name}a")
        ip(f"addr add fd00::9/64 dev {name}a nodad")
        yield f"{name}a"
    finally:
        subprocess.run(["ip", "link", "delete", f"{name}b"], check=False, capture_output=True)


def getting(link: str, name: str, *args: str) -> Spec:
    document = spec(*args)
    document["linux"]["netDevices"] = {link: {"name": name} if name else {}}
    return document


@pytest.mark.parametrize("name", ["", "eth7"])
def test_it_is_the_containers_as_it_was(containers: Containers, link: str, name: str) -> None:
    inside = name or link
    script = f"ip -o addr show {inside}; ip -o link show {inside}"
    status, output = containers.run(getting(link, name, "sh", "-c", script))
    assert status == 0
    assert "10.9.8.7/24" in output
    assert "fd00::9/64" in output
    assert output.count("fe80::") == 1  # its own there, not the one of before
    assert ",UP" in output or "<UP" in output
    assert link not in ip("-o link")


def test_one_that_is_not_there(containers: Containers) -> None:
    with pytest.raises(SpecError, match=r"linux\.netDevices\['none0'\]: there is no such interface"):
        containers.create(getting("none0", "", "true"))


def test_name_that_is_taken(containers: Containers, link: str) -> None:
    words = rf"linux\.netDevices\['{link}'\]: the container's network has an interface lo already"
    with pytest.raises(SpecError, match=words):
        containers.create(getting(link, "lo", "true"))
    assert link in ip("-o link")


def test_a_container_that_cannot_be_made_gives_it_back(containers: Containers, link: str) -> None:
    document = getting(link, "eth7", "true")
    document["hooks"] = {"createRuntime": [{"path": "/bin/false"}]}
    with pytest.raises(HookFailed):
        containers.create(document)
    shown = ip(f"-o addr show {link}")
    assert "10.9.8.7/24" in shown
    assert "fd00::9/64" in shown
    assert "UP" in ip(f"-o link show {link}").split("<")[1].split(">")[0].split(",")

"""Interfaces that are lent to a container, between two networks of the test's own."""

from __future__ import annotations

import errno
import subprocess
from typing import TYPE_CHECKING

import pytest

from oci_engine import net_devices
from oci_engine.errors import SetupFailed, SpecError
from oci_engine.net_devices import moved
from tests.support.namespaces import in_network_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from netlink.rtnl import Rtnetlink


def ip(words: str, pid: int = 0) -> str:
    where = ["nsenter", f"--net=/proc/{pid}/ns/net"] if pid else []
    return subprocess.run([*where, "ip", *words.split()], check=True, capture_output=True, text=True).stdout


def between(work: Callable[[int], None]) -> None:
    """With `a0` here, and the pid of a process that is elsewhere."""

    def inside() -> None:
        ip("link add a0 type veth peer name a1")
        ip("link set a0 up")
        ip("addr add 10.9.0.1/24 dev a0")
        ip("addr add fd09::1/64 dev a0 nodad")
        other = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1)
        assert other.stdout
        other.stdout.readline()
        try:
            work(other.pid)
        finally:
            other.communicate()

    in_network_namespace(inside)


def is_there(name: str, pid: int = 0) -> bool:
    """Up, with its addresses."""
    links = ip("-o link", pid)
    if f" {name}@" not in links and f" {name}:" not in links:
        return False
    shown = ip(f"-o addr show {name}", pid)
    flags = ip(f"-o link show {name}", pid).partition("<")[2].partition(">")[0].split(",")
    return "10.9.0.1/24" in shown and "fd09::1/64" in shown and "UP" in flags


def test_there_and_stays() -> None:
    def work(pid: int) -> None:
        with moved((("a0", "eth0"),), pid):
            assert is_there("eth0", pid)
            assert not is_there("a0")
        assert is_there("eth0", pid)

    between(work)


def test_back_when_the_block_fails() -> None:
    def work(pid: int) -> None:
        with pytest.raises(RuntimeError, match="wrong"), moved((("a0", "eth0"),), pid):
            raise RuntimeError("wrong")
        assert is_there("a0")
        assert not is_there("eth0", pid)

    between(work)


def test_back_when_it_cannot_have_its_addresses_there(monkeypatch: pytest.MonkeyPatch) -> None:
    revive, tried = net_devices._revive, list[str]()

    def fails_once(device: net_devices._Device, name: str, rtnl: Rtnetlink) -> None:
        tried.append(name)
        if len(tried) == 1:
            raise OSError(errno.ENOBUFS, "no room")
        revive(device, name, rtnl)

    monkeypatch.setattr(net_devices, "_revive", fails_once)

    def work(pid: int) -> None:
        with pytest.raises(SetupFailed, match=r"'a0'\]: no room"), moved((("a0", "eth0"),), pid):
            raise AssertionError("not to be reached")
        assert tried == ["eth0", "a0"]
        assert is_there("a0")

    between(work)


def test_back_when_the_next_one_is_not_there() -> None:
    def work(pid: int) -> None:
        words = r"linux\.netDevices\['b0'\]: there is no such interface"
        with pytest.raises(SpecError, match=words), moved((("a0", "eth0"), ("b0", "b0")), pid):
            raise AssertionError("not to be reached")
        assert is_there("a0")

    between(work)


def test_a_name_that_is_taken() -> None:
    def work(pid: int) -> None:
        words = "the container's network has an interface lo already"
        with pytest.raises(SpecError, match=words), moved((("a0", "lo"),), pid):
            raise AssertionError("not to be reached")
        assert is_there("a0")

    between(work)


def test_a_process_that_is_gone() -> None:
    def work(pid: int) -> None:
        with (
            pytest.raises(SetupFailed, match=r"linux\.netDevices: No such file"),
            moved((("a0", "eth0"),), 2**22 + 1),
        ):
            raise AssertionError("not to be reached")

    between(work)

"""Which daemon a file is, and how each is told the same thing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypervisor.errors import InvalidSpec, ProgramNotFound
from hypervisor.sockets import listener_and_connection
from hypervisor.spec import Share
from hypervisor.virtiofsd import Flavour, daemon_argv, flavour_of, parsed, shared_dir

# What Kata's configuration templates ship.
KATA_ARGS = ("--thread-pool-size=1", "-o", "announce_submounts")


def share(*extra: str, cache: str = "auto", directory: str = "/srv/x") -> Share:
    return Share(
        tag="kataShared",
        directory=Path(directory),
        daemon=Path("/usr/libexec/virtiofsd"),
        cache=cache,  # type: ignore[arg-type]  # odd values are part of the tables
        extra_args=extra,
    )


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((), {}),
        (KATA_ARGS, {"thread-pool-size": "1", "announce-submounts": None}),
        (
            ("-o", "cache=none,no_xattr,xattrmap=:map::user.:"),
            {"cache": "none", "no-xattr": None, "xattrmap": ":map::user.:"},
        ),
        (("-oannounce_submounts",), {"announce-submounts": None}),
        (
            ("--announce-submounts", "--thread-pool-size", "4"),
            {"announce-submounts": None, "thread-pool-size": "4"},
        ),
        (("-d",), {"debug": None}),
        (("--cache=auto", "-o", "cache=always"), {"cache": "always"}),
        (("-o",), {}),
    ],
)
def test_either_spelling_is_understood(args: tuple[str, ...], options: dict[str, str | None]) -> None:
    assert parsed(args) == options


@pytest.mark.parametrize("args", [("stray",), ("-x",), ("--",)])
def test_what_is_no_option_is_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(InvalidSpec, match="virtio_fs_extra_args: do not understand"):
        parsed(args)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            share(*KATA_ARGS),
            "-f --fd=7 -o source=/srv/x -o cache=auto -o sandbox=chroot --thread-pool-size=1 -o announce_submounts",
        ),
        (
            share("--announce-submounts"),
            "-f --fd=7 -o source=/srv/x -o cache=auto -o sandbox=chroot -o announce_submounts",
        ),
        (share(cache="never"), "-f --fd=7 -o source=/srv/x -o cache=none -o sandbox=chroot"),
        (share("--cache=never"), "-f --fd=7 -o source=/srv/x -o cache=none -o sandbox=chroot"),
        (
            share("--sandbox=namespace", "-d"),
            "-f --fd=7 -o source=/srv/x -o cache=auto -o sandbox=namespace -o debug",
        ),
        (share(directory="/srv/a,b"), r"-f --fd=7 -o source=/srv/a\,b -o cache=auto -o sandbox=chroot"),
    ],
)
def test_words_for_the_c_daemon(spec: Share, words: str) -> None:
    assert daemon_argv(Flavour.C, spec, 7) == ["/usr/libexec/virtiofsd", *words.split()]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            share(*KATA_ARGS),
            "--fd=7 --shared-dir=/srv/x --cache=auto --sandbox=chroot --thread-pool-size=1 --announce-submounts",
        ),
        (
            share("-o", "cache=none,xattr"),
            "--fd=7 --shared-dir=/srv/x --cache=never --sandbox=chroot --xattr",
        ),
        (
            share("-o", "no_xattr,no_posix_acl,no_readdirplus"),
            "--fd=7 --shared-dir=/srv/x --cache=auto --sandbox=chroot --no-readdirplus",
        ),
        (
            share("-d", cache="metadata"),
            "--fd=7 --shared-dir=/srv/x --cache=metadata --sandbox=chroot --log-level=debug",
        ),
        (
            share("--sandbox=none", directory="/srv/a,b"),
            "--fd=7 --shared-dir=/srv/a,b --cache=auto --sandbox=none",
        ),
    ],
)
def test_words_for_the_rust_daemon(spec: Share, words: str) -> None:
    assert daemon_argv(Flavour.RUST, spec, 7) == ["/usr/libexec/virtiofsd", *words.split()]


def test_a_mode_that_only_one_daemon_has() -> None:
    with pytest.raises(InvalidSpec, match="needs the Rust virtiofsd"):
        daemon_argv(Flavour.C, share(cache="metadata"), 7)


@pytest.mark.parametrize(
    ("content", "flavour"),
    [
        (b"\x7fELF..\0--shared-dir <shared-dir>\0Use --fd=\0", Flavour.RUST),
        (b"\x7fELF..\0    --socket-group=GRNAME      name of group\0", Flavour.C),
        (b"#!/bin/sh\necho 'virtiofsd version 7.2.22 (Distribution)'\n", Flavour.C),
        (b"#!/bin/sh\necho 'virtiofsd 1.13.0'\n", Flavour.RUST),
    ],
)
async def test_a_daemon_is_recognised(tmp_path: Path, content: bytes, flavour: Flavour) -> None:
    daemon = tmp_path / "virtiofsd"
    daemon.write_bytes(content)
    daemon.chmod(0o755)
    assert await flavour_of(daemon) is flavour


@pytest.mark.parametrize("content", [None, b""])
async def test_no_daemon(tmp_path: Path, content: bytes | None) -> None:
    daemon = tmp_path / "virtiofsd"
    if content is not None:
        daemon.write_bytes(content)
    with pytest.raises(ProgramNotFound, match="install virtiofsd or correct virtio_fs_daemon"):
        await flavour_of(daemon)


async def test_qemus_connection_waits_in_the_daemons_listener(tmp_path: Path) -> None:
    """A stand-in daemon accepts on the descriptor it was given and says something through it."""
    daemon = tmp_path / "virtiofsd"
    daemon.write_text(
        "#!/usr/bin/python3 -IS\n"
        "'''shared-dir'''\n"
        "import socket, sys\n"
        "fd = int(sys.argv[1].removeprefix('--fd='))\n"
        "peer, _ = socket.socket(fileno=fd).accept()\n"
        "peer.send(' '.join(sys.argv[2:]).encode())\n"
        "peer.recv(1)\n"
    )
    daemon.chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    spec = Share(tag="t", directory=Path("/srv/x"), daemon=daemon)
    listener, connection = listener_and_connection(run_dir / "fs0.sock")
    assert os.listdir(run_dir) == []  # nobody else can connect
    async with shared_dir(spec, listener) as process:
        assert listener.fileno() == -1
        connection.settimeout(10)
        assert connection.recv(4096) == b"--shared-dir=/srv/x --cache=auto --sandbox=chroot"
        connection.close()  # as QEMU's end of the socket does when QEMU ends
        assert str(await process.wait()) == "exit status 0"

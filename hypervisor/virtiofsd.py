"""`shared_dir()`: a virtiofsd for one shared directory, of either kind, and the socket on which QEMU meets
it.

Two programs carry the name: QEMU's C daemon (up to QEMU 7.2) takes mount-style `-o` options, the Rust one
takes long options. Kata's configuration writes either spelling for either program; `daemon_argv()` says it in
the words of the one that is installed.

The daemon inherits a listening socket in which QEMU's connection already waits (`hypervisor.sockets`): nobody
polls for a path, the two may start in any order, and nobody else can get in between.
"""

from __future__ import annotations

import mmap
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec, ProgramNotFound
from hypervisor.process import spawned

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from pathlib import Path

    from hypervisor.process import Process
    from hypervisor.spec import Share

# Options of the C daemon that are not mount-style.
_C_LONG_OPTIONS = frozenset(
    {"fd", "socket-path", "socket-group", "thread-pool-size", "rlimit-nofile", "syslog"}
)
# The Rust daemon has "no-" forms only for what it does by default; other negations are its default.
_RUST_NEGATIONS = frozenset({"no-announce-submounts", "no-killpriv-v2", "no-readdirplus"})


class Flavour(Enum):
    """Which virtiofsd a program is."""

    C = "QEMU's virtiofsd"
    RUST = "the Rust virtiofsd"


@asynccontextmanager
async def shared_dir(share: Share, listener: socket.socket) -> AsyncIterator[Process]:
    """Serve `share.directory` to who is connected to `listener`, for the length of the block.

    `listener` is closed here once the daemon has it. The daemon ends by itself when its one connection
    closes; leaving the block kills what is left. Raises ProgramNotFound when the daemon is missing,
    InvalidSpec for options it cannot take.
    """
    async with AsyncExitStack() as stack:
        with listener:
            argv = daemon_argv(await flavour_of(share.daemon), share, listener.fileno())
            # What a user of the guest may do, the guest's kernel has checked, and only it knows all groups of the user:
            # the daemon makes a file as that user, but without the user's supplementary groups.
            daemon = spawned(argv, fds=[listener.fileno()], keep_capabilities=True)
            process = await stack.enter_async_context(daemon)
        yield process


async def flavour_of(daemon: Path) -> Flavour:
    """Which daemon a file is, told by an option's name inside it; a wrapper is asked for its version.

    Looking into the file takes well under a millisecond, running it several.
    """
    if flavour := _flavour_by_content(daemon):
        return flavour
    async with spawned([str(daemon), "--version"]) as process:
        await process.wait()
        # The C daemon prints "virtiofsd version 7.2.22 (...)", the Rust one "virtiofsd 1.13.0".
        is_c = any(line.startswith("virtiofsd version ") for line in process.output_tail())
        return Flavour.C if is_c else Flavour.RUST


def _flavour_by_content(daemon: Path) -> Flavour | None:
    try:
        with open(daemon, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            if content.find(b"shared-dir") >= 0:
                return Flavour.RUST
            return Flavour.C if content.find(b"--socket-group=GRNAME") >= 0 else None
    except (OSError, ValueError) as err:  # ValueError: an empty file
        why = getattr(err, "strerror", None) or str(err)
        remedy = "install virtiofsd or correct virtio_fs_daemon"
        raise ProgramNotFound(daemon, why, remedy) from err


def daemon_argv(flavour: Flavour, share: Share, listener_fd: int) -> list[str]:
    """The daemon's argument list. `share.extra_args` win over our own choices.

    The daemon changes its root to the directory instead of entering a mount namespace: mounts made below the
    directory later must show up in the guest.
    """
    options = {"cache": share.cache, "sandbox": "chroot", **parsed(share.extra_args)}
    if flavour is Flavour.C:
        return [str(share.daemon), *_c_words(share, listener_fd, options)]
    return [str(share.daemon), *_rust_words(share, listener_fd, options)]


def parsed(args: Sequence[str]) -> dict[str, str | None]:
    """Options of either spelling by their long name (dashes, no prefix); None marks one without a value."""
    options: dict[str, str | None] = {}
    words = iter(args)
    for word in words:
        if word == "-o":
            options.update(_mount_style(next(words, "")))
        elif word.startswith("-o"):
            options.update(_mount_style(word[2:]))
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options[name] = value if equals else None
        elif word == "-d":
            options["debug"] = None
        elif options and not word.startswith("-"):  # "--name value"
            options[next(reversed(options))] = word
        else:
            raise InvalidSpec(f"virtio_fs_extra_args: do not understand {word!r}; write --name=value")
    return options


def _mount_style(text: str) -> Iterator[tuple[str, str | None]]:
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        yield name.replace("_", "-"), value if equals else None


def _c_words(share: Share, listener_fd: int, options: Mapping[str, str | None]) -> Iterator[str]:
    yield "-f"
    yield f"--fd={listener_fd}"
    yield from ("-o", f"source={_mount_quoted(str(share.directory))}")
    for name, value in options.items():
        if name == "cache":
            value = _c_cache(value)
        if name in _C_LONG_OPTIONS:
            yield f"--{name}" if value is None else f"--{name}={value}"
        else:
            option = name.replace("-", "_")
            yield from ("-o", option if value is None else f"{option}={_mount_quoted(value)}")


def _c_cache(mode: str | None) -> str:
    if mode == "metadata":
        raise InvalidSpec('virtio_fs_cache = "metadata" needs the Rust virtiofsd; use "auto"')
    return "none" if mode in ("never", None) else mode


def _mount_quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _rust_words(share: Share, listener_fd: int, options: Mapping[str, str | None]) -> Iterator[str]:
    yield f"--fd={listener_fd}"
    yield f"--shared-dir={share.directory}"
    for name, value in options.items():
        if name == "cache" and value == "none":
            value = "never"
        if name == "debug":
            yield "--log-level=debug"
        elif value is not None:
            yield f"--{name}={value}"
        elif not name.startswith("no-") or name in _RUST_NEGATIONS:
            yield f"--{name}"

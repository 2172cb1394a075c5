"""What a QEMU program is able to do: its version, its types of objects and devices, its machines, a few properties.

No ordinary start pays for this. QEMU is asked when a command line has something that not every QEMU has
(`RARE_TYPES`, `RARE_PROPERTIES`), when a machine did not come up, and by `kata-py check`. It is started without a
machine for that, and its answer is kept in a file, so that it is asked once per program and version of it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from hypervisor.errors import HostUnsupported, ProgramNotFound
from hypervisor.process import spawned
from hypervisor.qemu import args, commands
from hypervisor.qemu.cmdline import RARE_PROPERTIES, RARE_TYPES, rare_properties_in, types_in
from hypervisor.qemu.qmp import connected
from hypervisor.sockets import unix_listener
from hypervisor.spec import QmpTimeouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = structlog.get_logger(__name__)

_PATIENCE = QmpTimeouts(read_timeout_s=5, connect_timeout_s=20)
_MOST_BYTES = 1 << 20


class Capabilities(msgspec.Struct, frozen=True):
    """One program's; `version` is major, minor, micro."""

    version: tuple[int, int, int]
    types: frozenset[str]
    machines: frozenset[str]
    properties: frozenset[tuple[str, str]]
    """Those of `RARE_PROPERTIES` that it has."""

    @property
    def release(self) -> str:
        return ".".join(map(str, self.version))


class _Program(msgspec.Struct, frozen=True):
    """A program's file, as it was when the program answered."""

    path: str
    mtime_ns: int
    size: int


class _Kept(msgspec.Struct, frozen=True):
    """An answer and who gave it."""

    program: _Program
    capabilities: Capabilities


class Lack(NamedTuple):
    """What a command line names and a QEMU does not have."""

    what: str
    remedy: str


async def capabilities(qemu: Path, run_dir: Path, *, cache: Path | None = None) -> Capabilities:
    """What `qemu` has. A socket is in `run_dir` meanwhile; `cache` is where answers are kept, by default the user's
    own place for caches.

    Raises ProgramNotFound, QmpUnavailable when it does not answer, HostUnsupported when it is too old to.
    """
    program = _identity(qemu)
    kept_in = (cache or _cache_dir()) / _cache_name(program)
    if (kept := _kept(kept_in)) is not None and kept.program == program:
        return kept.capabilities
    answer = await _asked(qemu, run_dir)
    try:
        _keep(kept_in, _Kept(program, answer))
    except OSError as err:  # then it is asked again the next time
        log.debug("capabilities_not_kept", file=str(kept_in), error=str(err))
    return answer


async def demand(argv: Sequence[str], run_dir: Path) -> None:
    """Raise HostUnsupported, with QEMU's version and a remedy, when a command line's program lacks something in it.

    Raises what `capabilities` raises, too.
    """
    has = await capabilities(Path(argv[0]), run_dir)
    for lack in lacks(argv, has):
        raise HostUnsupported(f"QEMU {has.release} at {argv[0]} has no {lack.what}; {lack.remedy}")


def lacks(argv: Sequence[str], has: Capabilities) -> Iterator[Lack]:
    """What of a command line a QEMU does not have."""
    for switch, name in types_in(argv):
        if name not in (has.machines if switch == "-machine" else has.types):
            remedy = RARE_TYPES.get(name, "install the distribution's full QEMU")
            yield Lack(f"{switch.removeprefix('-')} {name}", remedy)
    for driver, name in rare_properties_in(argv):
        if (driver, name) not in has.properties:
            yield Lack(f"property {name} of {driver}", RARE_PROPERTIES[driver, name])


async def _asked(qemu: Path, run_dir: Path) -> Capabilities:
    path = run_dir / "capabilities.sock"
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(unix_listener(path))
        undo.callback(path.unlink, missing_ok=True)
        switches = (
            args.ChardevSocket(id="qmp", fd=listener.fileno(), server=True, wait=False),
            args.Mon(chardev="qmp"),
            args.Fixed(),
        )
        words = [word for switch in switches for word in switch.argv()]
        async with (
            spawned([str(qemu), "-machine", "none", *words], fds=[listener.fileno()]) as process,
            connected(path, _PATIENCE, process.exited, lambda event: None) as monitor,
        ):
            types = await commands.qom_list_types(monitor)
            machines = await commands.query_machines(monitor)
            names = (name for machine in machines for name in (machine.name, machine.alias) if name)
            properties = {
                (driver, name)
                for driver in {driver for driver, _ in RARE_PROPERTIES} & types
                for name in await commands.device_list_properties(monitor, driver)
            }
            return Capabilities(
                monitor.version, types, frozenset(names), frozenset(properties & RARE_PROPERTIES.keys())
            )


def _identity(qemu: Path) -> _Program:
    try:
        status = qemu.stat()
    except OSError as err:
        remedy = "install it or correct its path in the configuration"
        raise ProgramNotFound(qemu, err.strerror or str(err), remedy) from err
    return _Program(str(qemu), status.st_mtime_ns, status.st_size)


def _cache_dir() -> Path:
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "kata-py"
    # Services, as containerd is one, have no home.
    return Path("/var/cache/kata-py") if os.geteuid() == 0 else Path.home() / ".cache" / "kata-py"


def _cache_name(program: _Program) -> str:
    """One file for each path: the answer of an updated program replaces the old one."""
    return f"{program.path.strip('/').replace('/', '-')}.json"


def _kept(file: Path) -> _Kept | None:
    """An answer that is whole, and was written by this user for nobody else."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(fd, "rb") as opened:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            log.warning("capabilities_not_trusted", file=str(file), owner=status.st_uid)
            return None
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(opened.read(_MOST_BYTES), type=_Kept)
    return None


def _keep(file: Path, kept: _Kept) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as opened:
            opened.write(msgspec.json.encode(kept))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)

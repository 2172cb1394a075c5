"""`booted()`: sockets, virtiofsd, QEMU and its monitor put together into one running machine.

What happens in which order, and why: QEMU is the slowest to come up, so everything that can wait is done
after it was started (importing the vsock device and the QMP library, shaking hands with the monitor).
virtiofsd and QEMU start side by side: the sockets between them exist and are connected before either of them
runs. The guest boots while we shake hands; nothing of ours holds it up.

The end is a SIGKILL: the guest has nothing to save (its file systems belong to the host or are thrown away),
and a killed QEMU leaves nothing behind. virtiofsd ends when QEMU's end of its socket closes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from hypervisor.arch import arch_named
from hypervisor.console import Console
from hypervisor.errors import (
    BootFailed,
    DeviceUnavailable,
    HostUnsupported,
    HypervisorError,
    QmpUnavailable,
)
from hypervisor.process import spawned
from hypervisor.qemu.cmdline import Fds, build_cmdline, is_rare
from hypervisor.qemu.qmp import Monitor, connected
from hypervisor.sockets import listener_and_connection, unix_listener
from hypervisor.virtiofsd import shared_dir
from hypervisor.vsock.base import FIRST_GUEST_CID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from hypervisor.process import Process, ProcessExit
    from hypervisor.qemu.disk import DiskAddress, Disks
    from hypervisor.qemu.events import Event
    from hypervisor.qemu.nic import Interfaces, NicFds
    from hypervisor.qemu.resize import Resizing
    from hypervisor.qemu.vfio import HostDevices
    from hypervisor.spec import Disk, Nic, VhostUserDisk, VmSpec
    from hypervisor.vfio import HostDevice
    from hypervisor.vsock.base import OnConnection, Vsock

log = structlog.get_logger(__name__)

# A QEMU that ends closes its sockets some milliseconds before it is gone. A helper's end is the machine's
# failure only if QEMU outlives it by more than that.
_QEMU_END_S = 1.0
_WHAT = "the virtual machine did not start"


class Machine:
    """A machine whose QEMU runs and answers its monitor. Made by `booted()`, which also ends it."""

    def __init__(
        self,
        spec: VmSpec,
        qemu: Process,
        helpers: Mapping[str, Process],
        console: Console,
        vsock: Vsock | None,
    ) -> None:
        self.pid = qemu.pid
        self.pids = {"qemu": qemu.pid, **{name: helper.pid for name, helper in helpers.items()}}
        self.exited: asyncio.Future[ProcessExit] = qemu.exited
        self.timings: dict[str, float] = {}
        """Monotonic seconds of `spawned` (QEMU runs) and `qmp_ready`."""
        self._spec = spec
        self._interfaces: Interfaces | None = None
        self._host_devices: HostDevices | None = None
        self._disks: Disks | None = None
        self._resizing: Resizing | None = None
        self._qemu = qemu
        self._helpers = helpers
        self._console = console
        self._vsock = vsock
        self._monitor: Monitor | None = None
        self._culprit: str | None = None
        self._saving: asyncio.Task[None] | None = None

    @property
    def vsock(self) -> Vsock:
        """The way to talk to the guest."""
        if self._vsock is None:
            raise LookupError("the machine was specified without a vsock device")
        return self._vsock

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor, connected since before `booted()` gave us away."""
        assert self._monitor is not None
        return self._monitor

    def console_tail(self) -> list[str]:
        """The guest's last lines on its serial console, oldest first, as printable text."""
        if self.exited.done():
            self._console.drain()
        return self._console.tail()

    def last_progress(self) -> float:
        """Loop time of the guest's last word on its console; until there is one, of the machine's start.

        A guest whose memory is being saved is not expected to make progress.
        """
        if self._saving is not None:
            return asyncio.get_running_loop().time()
        return self._console.last_read_at

    async def pause(self) -> None:
        """Stop the guest's processors. Raises QmpError."""
        await self.monitor.stop()

    async def resume(self) -> None:
        """Let the guest's processors run. Raises QmpError."""
        await self.monitor.cont()

    async def plug_nic(self, nic: Nic) -> None:
        """Give the guest one more network interface. Raises HotplugRefused, HostUnsupported, QmpError."""
        await self._nics.plug(self.monitor, nic)

    async def unplug_nic(self, nic_id: str) -> None:
        """Take a network interface away; one that is not there is fine. Raises HotplugRefused, QmpError."""
        await self._nics.unplug(self.monitor, nic_id)

    async def plug_host_device(self, device: HostDevice) -> None:
        """Give the guest one more device of the host.

        Raises HotplugRefused, DeviceUnavailable, HostUnsupported, InvalidSpec, QmpError.
        """
        await self._passed_through.plug(self.monitor, device, arch_named(self._spec.arch))

    async def unplug_host_device(self, device: HostDevice) -> None:
        """Take a device of the host back; one that is not there is fine. Raises HotplugRefused, QmpError."""
        await self._passed_through.unplug(self.monitor, device)

    async def pci_path(self, device_id: str) -> str | None:
        """Where the guest finds a PCI device, by its slots from the root. Raises QmpError."""
        from hypervisor.qemu import commands

        return commands.pci_path(await commands.query_pci(self.monitor), device_id)

    @property
    def _passed_through(self) -> HostDevices:
        if self._host_devices is None:
            from hypervisor.qemu.vfio import HostDevices

            self._host_devices = HostDevices(self._spec)
        return self._host_devices

    @property
    def resizing(self) -> Resizing:
        """The way to other amounts of processors and memory."""
        if self._resizing is None:
            from hypervisor.qemu.resize import Resizing

            self._resizing = Resizing(self._spec, self.monitor)
        return self._resizing

    @property
    def _nics(self) -> Interfaces:
        if self._interfaces is None:
            from hypervisor.qemu.nic import Interfaces

            self._interfaces = Interfaces(self._spec)
        return self._interfaces

    async def plug_disk(self, disk: Disk, fd: int) -> DiskAddress:
        """Give the guest one more disk, with what `fd` is open on. Raises HotplugRefused, QmpError."""
        return await self._hot_disks.plug(self.monitor, disk, fd)

    async def plug_vhost_user_disk(self, disk: VhostUserDisk) -> DiskAddress:
        """Give the guest a disk that another program of the host serves. Raises HotplugRefused, QmpError."""
        return await self._hot_disks.plug_vhost_user(self.monitor, disk)

    async def unplug_disk(self, disk_id: str) -> None:
        """Take a disk away; one that is not there is fine. Raises HotplugRefused, QmpError."""
        await self._hot_disks.unplug(self.monitor, disk_id)

    async def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Let the guest see another size of a disk. Raises HotplugRefused, QmpError."""
        await self._hot_disks.resize(self.monitor, disk_id, size_bytes)

    @property
    def _hot_disks(self) -> Disks:
        if self._disks is None:
            from hypervisor.qemu.disk import Disks

            self._disks = Disks(self._spec)
        return self._disks

    async def stop(self) -> None:
        """End the machine now and wait for QEMU's end; repeating it is harmless.

        The helpers end with the block of `booted()`.
        """
        self._qemu.kill()
        await self._qemu.wait()

    def failure(self, what: str, why: str = "") -> BootFailed:
        """The error that says `what` did not work, with all that is known about the reason.

        `why` is used when nothing better is known: when QEMU and its helpers all still run.
        """
        ended = self.exited.result() if self.exited.done() else None
        stderr, console = self._qemu.output_tail(), self.console_tail()
        if self._culprit is not None:
            reason = self._culprit
        elif ended is not None:
            reason = _with_last_line(_end_of("QEMU", ended), stderr or console)
        else:
            reason = _with_last_line(why or "the guest does not answer", console)
        remedy = "the guest's last words are in containerd's log, with debugging QEMU's arguments too"
        return BootFailed(what, reason, remedy, exit=ended, stderr_tail=stderr, console_tail=console)

    async def _watch(self, name: str, helper: Process) -> None:
        """End the machine when a helper dies under it: a guest without its files only hangs."""
        ended = await helper.wait()
        if self.exited.done():
            return
        reason = _with_last_line(_end_of(name, ended), helper.output_tail())
        if ended.status != 0:
            self._culprit = reason
        await asyncio.wait([self.exited], timeout=_QEMU_END_S)
        if not self.exited.done():
            log.error("machine_lost_helper", helper=name, reason=reason)
            self._culprit = reason
            self._qemu.kill()

    def _heard(self, event: Event) -> None:
        """QEMU of a machine with `dump_dir` stops where others end: it is ended here."""
        _log_event(event)
        if self._spec.dump_dir is None or self._saving is not None:
            return
        from hypervisor.qemu.dump import is_panic
        from hypervisor.qemu.events import Shutdown

        if is_panic(event):
            self._saving = asyncio.create_task(self._save_memory())
        elif isinstance(event, Shutdown) and event.guest:
            self._qemu.kill()

    async def _save_memory(self) -> None:
        from hypervisor.qemu import dump

        self._culprit = _with_last_line("the guest's kernel gave up", self.console_tail())
        try:
            core = await dump.guest_memory(self.monitor, self._spec, self._qemu.argv, self.console_tail())
            log.error("guest_memory_saved", file=str(core))
        except (HypervisorError, OSError) as err:
            log.error("guest_memory_not_saved", error=str(err))
        finally:
            self._qemu.kill()

    async def _end_saving(self) -> None:
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait([self._saving])

    def _blame_device(self, failure: BootFailed) -> None:
        """Raise DeviceUnavailable when it was for a device of the host that QEMU ended."""
        from hypervisor.qemu.vfio import blamed

        if reason := blamed(failure.stderr_tail, self._qemu.argv, self._spec.host_devices):
            raise DeviceUnavailable(f"{_WHAT}: {reason}") from failure

    async def _connect_monitor(self, undo: AsyncExitStack) -> None:
        spec = self._spec
        try:
            self._monitor = await undo.enter_async_context(
                connected(_qmp_path(spec), spec.qmp, self.exited, self._heard)
            )
        except QmpUnavailable as err:
            failure = self.failure(_WHAT, str(err))
            if spec.host_devices:
                self._blame_device(failure)
            if failure.exit is not None and failure.exit.status:
                await _explain(failure, self._qemu.argv, spec.run_dir)
            raise failure from err
        self.timings["qmp_ready"] = time.monotonic()


@asynccontextmanager
async def booted(
    spec: VmSpec, *, listeners: Mapping[int, OnConnection] | None = None
) -> AsyncIterator[Machine]:
    """A running machine for the length of the block; nothing of it is left after it, whatever happens inside.

    The machine is given away when QEMU answers its monitor, long before the guest is up. `listeners` are host
    ports that the guest may connect to, open before the guest's first instruction.

    Raises BootFailed when QEMU or virtiofsd does not come up, ProgramNotFound, HostUnsupported, InvalidSpec; OSError
    when the host is short of something.
    """
    _check_files(spec)
    if spec.user is not None:
        from hypervisor import rootless

        await rootless.check(spec, spec.user)
    async with AsyncExitStack() as undo:
        try:
            machine = await _boot(spec, listeners or {}, undo)
        except OSError as err:  # of a system call: the host lacks something
            raise OSError(err.errno, f"{_WHAT}: {err.strerror}", err.filename) from err
        yield machine


async def _boot(spec: VmSpec, listeners: Mapping[int, OnConnection], undo: AsyncExitStack) -> Machine:
    spec.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as handed_over:  # what QEMU inherits, and what is ours no longer once it runs
        console_end, guest_end = socket.socketpair()
        handed_over.enter_context(guest_end)
        undo.callback(console_end.close)  # also when the console cannot be made
        console = Console(console_end, spec.run_dir / "console.log")
        undo.callback(console.close)
        qmp = handed_over.enter_context(unix_listener(_qmp_path(spec)))
        undo.callback(_qmp_path(spec).unlink, missing_ok=True)
        vsock = _vsock_plan(spec, handed_over, undo)
        shares = [_share_sockets(spec, index, handed_over, undo) for index in range(len(spec.shares))]
        iommufd, own_files = _host_device_files(spec, handed_over)
        fds = Fds(
            qmp=qmp.fileno(),
            console=guest_end.fileno(),
            vsock=vsock.fd,
            guest_cid=vsock.guest_cid,
            shares=tuple(connection.fileno() for _, connection in shares),
            initdata=_initdata_fd(spec, handed_over),
            nics=_nics(spec, handed_over),
            iommufd=iommufd,
            host_devices=own_files,
        )
        argv = build_cmdline(spec, fds)
        if is_rare(argv):
            from hypervisor.qemu.capabilities import demand

            await demand(argv, spec.run_dir)
        qemu = await undo.enter_async_context(
            spawned(
                argv,
                fds=fds.all(),
                netns=spec.netns,
                user=spec.user,
                selinux_label=spec.selinux_label,
                locked_bytes=_locked_bytes(spec),
            )
        )
    spawned_at = time.monotonic()
    device = _started_vsock(vsock, listeners, undo)
    helpers = {
        f"virtiofsd{index or ''}": await undo.enter_async_context(shared_dir(share, listener))
        for index, (share, (listener, _)) in enumerate(zip(spec.shares, shares, strict=True))
    }
    machine = Machine(spec, qemu, helpers, console, device)
    machine.timings["spawned"] = spawned_at
    for name, helper in helpers.items():
        undo.callback(asyncio.create_task(machine._watch(name, helper)).cancel)
    await machine._connect_monitor(undo)
    undo.push_async_callback(machine._end_saving)
    undo.callback(qemu.kill)  # first of all at the end: the rest of the undoing then meets no resistance
    log.info("machine_started", vm=spec.name, pid=machine.pid, accel=spec.accel)
    return machine


def _initdata_fd(spec: VmSpec, handed_over: ExitStack) -> int | None:
    if spec.initdata is None:
        return None
    fd = os.open(spec.initdata, os.O_RDONLY | os.O_CLOEXEC)
    handed_over.callback(os.close, fd)
    return fd


def _share_sockets(
    spec: VmSpec, index: int, handed_over: ExitStack, undo: AsyncExitStack
) -> tuple[socket.socket, socket.socket]:
    """virtiofsd's listener and QEMU's connection to it."""
    listener, connection = listener_and_connection(spec.run_dir / f"fs{index}.sock")
    undo.callback(listener.close)
    return listener, handed_over.enter_context(connection)


def _nics(spec: VmSpec, handed_over: ExitStack) -> tuple[NicFds, ...]:
    """The taps, in the machine's network namespace. They last as long as QEMU, who alone has them open then."""
    if not spec.nics:
        return ()
    from hypervisor.netns import entered
    from hypervisor.qemu.nic import opened

    with entered(spec.netns):
        return tuple(opened(nic, handed_over) for nic in spec.nics)


def _host_device_files(spec: VmSpec, handed_over: ExitStack) -> tuple[int | None, tuple[int | None, ...]]:
    if not spec.host_devices:
        return None, ()
    from hypervisor.qemu.vfio import opened

    return opened(spec.host_devices, handed_over)


def _locked_bytes(spec: VmSpec) -> int:
    """What has to be allowed to a QEMU that is not root; root may lock what it likes."""
    if spec.user is None or not (spec.host_devices or spec.host_device_places):
        return 0
    from hypervisor.qemu.vfio import locked_bytes

    return locked_bytes(spec)


@dataclass(frozen=True)
class _VsockPlan:
    """What QEMU needs of the vsock device before it starts, and how to make our side of it afterwards."""

    fd: int | None
    guest_cid: int | None
    make: Callable[[], Vsock | None]


def _vsock_plan(spec: VmSpec, handed_over: ExitStack, undo: AsyncExitStack) -> _VsockPlan:
    if spec.vsock is None:
        return _VsockPlan(None, None, lambda: None)
    if spec.vsock == "vhost":
        from hypervisor.vsock.vhost import VhostVsock, open_device

        fd, guest_cid = open_device()
        handed_over.callback(os.close, fd)
        return _VsockPlan(fd, guest_cid, lambda: VhostVsock(guest_cid))
    ours, qemus = socket.socketpair()
    handed_over.enter_context(qemus)
    undo.callback(ours.close)
    return _VsockPlan(qemus.fileno(), None, lambda: _user_vsock(ours))


def _user_vsock(sock: socket.socket) -> Vsock:
    from hypervisor.vsock.user import UserVsock

    # Each of these devices is a world of its own, so they may all have the same address.
    return UserVsock(sock, guest_cid=FIRST_GUEST_CID)


def _started_vsock(
    plan: _VsockPlan, listeners: Mapping[int, OnConnection], undo: AsyncExitStack
) -> Vsock | None:
    vsock = plan.make()
    if vsock is not None:
        undo.push_async_callback(vsock.aclose)
        for port, on_connection in listeners.items():
            vsock.listen(port, on_connection)
    return vsock


def _check_files(spec: VmSpec) -> None:
    """Say at once, and with a remedy, what QEMU would say later and in its own words."""
    flash = (("pflashes", path) for path in spec.pflash)
    files = (("kernel", spec.kernel), ("initrd", spec.initrd), ("image", spec.image))
    for key, path in (*files, ("image_initrd", spec.image_initrd), ("firmware", spec.firmware), *flash):
        if path is not None and not path.is_file():
            raise BootFailed(
                _WHAT,
                f"there is no {key} at {path}",
                f"install the guest image or correct {key} in the configuration",
            )


def _qmp_path(spec: VmSpec) -> Path:
    return spec.run_dir / "qmp.sock"


def _end_of(name: str, ended: ProcessExit) -> str:
    return f"{name} ended with {ended}" if ended.signal is None else f"{name} was {ended}"


def _with_last_line(text: str, lines: Sequence[str]) -> str:
    """Add the line that tells most: a panic's first one, which its registers and stack follow, else the last one before
    the kernel's farewell.
    """
    panics = [line for line in lines if "Kernel panic" in line]
    words = [line for line in lines if "reboot: Restarting system" not in line]
    return f"{text}: {(panics or words or lines)[-1]}" if lines else text


async def _explain(failure: BootFailed, argv: Sequence[str], run_dir: Path) -> None:
    """Raise HostUnsupported when it was for a lack of QEMU's that QEMU ended; what it said itself is for the log."""
    from hypervisor.qemu.capabilities import demand

    try:
        await demand(argv, run_dir)
    except HostUnsupported as err:
        log.error("qemu_refused_command_line", qemu=list(failure.stderr_tail))
        raise err from failure
    except HypervisorError as err:
        log.debug("capabilities_unknown", qemu=argv[0], error=str(err))


def _log_event(event: Event) -> None:
    """What QEMU tells about the guest, as far as it matters for understanding its end."""
    from hypervisor.qemu.events import GuestPanicked, Shutdown

    if isinstance(event, GuestPanicked):
        log.error("guest_panicked", action=event.action)
    elif isinstance(event, Shutdown):
        log.info("guest_shut_down", reason=event.reason, by_guest=event.guest)
    else:
        log.debug("qmp_event", qemu_event=event)

"""The RPC methods of the agent's services: decode, call, encode. Decisions are made elsewhere.

What changes something runs in a task of its own: when the host goes away in the middle, ttrpc cancels the handler,
and a half-made container would be left behind.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from agent_proto.gen import agent_pb2, csi_pb2, health_pb2, kata_py_agent_pb2, types_pb2
from guest_agent import machine
from guest_agent.errors import InvalidRequest, NotFound, NotSupported
from guest_agent.namespaces import drop_missing_security, drop_v1_limits
from guest_agent.sandbox import refuse_nul, refuse_unsupported
from guest_agent.spawn import in_thread

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from guest_agent.cmdline import Settings
    from guest_agent.log import Log
    from guest_agent.routing import NetworkMirror
    from guest_agent.sandbox import Sandbox
    from guest_agent.uevent import Uevents
    from ttrpc import Call, Handler

TTRPC_PROTOCOL_VERSION = "0.0.1"
#: Devices of the host; what is done about them is loaded with the first one.
PASSED_THROUGH = ("vfio-pci", "vfio-pci-gk", "vfio-ap", "vfio-ap-cold")
#: Disks that the host plugs in, named by their address; what finds them is loaded with the first one.
DISKS = ("blk", "blk-ccw", "scsi")
DEVICE_HANDLERS: tuple[str, ...] = (*DISKS, *PASSED_THROUGH)
EXTRA_FEATURES: tuple[str, ...] = ("kata-py", kata_py_agent_pb2.DESCRIPTOR.package)
MAX_DIAGNOSTIC_BYTES = 64 * 1024


class AgentService:
    """Answers for one sandbox."""

    def __init__(self, sandbox: Sandbox, settings: Settings, uevents: Uevents, log: Log) -> None:
        self._sandbox = sandbox
        self._settings = settings
        self._uevents = uevents
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()
        self._mirror: NetworkMirror | None = None

    def handlers(self) -> dict[str, Handler]:
        """By method name, for ttrpc. Every other method of the service answers UNIMPLEMENTED with its name."""
        return {
            "CreateSandbox": self.create_sandbox,
            "DestroySandbox": self.destroy_sandbox,
            "GetGuestDetails": self.get_guest_details,
            "SetGuestDateTime": self.set_guest_date_time,
            "ReseedRandomDev": self.reseed_random_dev,
            "OnlineCPUMem": self.online_cpu_mem,
            "UpdateInterface": self.update_interface,
            "UpdateRoutes": self.update_routes,
            "ListInterfaces": self.list_interfaces,
            "ListRoutes": self.list_routes,
            "AddARPNeighbors": self.add_arp_neighbors,
            "CopyFile": self.copy_file,
            "UpdateEphemeralMounts": self.update_ephemeral_mounts,
            "GetMetrics": self.get_metrics,
            "GetVolumeStats": self.get_volume_stats,
            "ResizeVolume": self.resize_volume,
            "GetDiagnosticData": self.get_diagnostic_data,
            "GetOOMEvent": self.get_oom_event,
            "AddSwap": self.add_swap,
            "AddSwapPath": self.add_swap_path,
            "CreateContainer": self.create_container,
            "StartContainer": self.start_container,
            "RemoveContainer": self.remove_container,
            "UpdateContainer": self.update_container,
            "StatsContainer": self.stats_container,
            "PauseContainer": self.pause_container,
            "ResumeContainer": self.resume_container,
            "ExecProcess": self.exec_process,
            "SignalProcess": self.signal_process,
            "WaitProcess": self.wait_process,
            "WriteStdin": self.write_stdin,
            "CloseStdin": self.close_stdin,
            "ReadStdout": self.read_stdout,
            "ReadStderr": self.read_stderr,
            "TtyWinResize": self.tty_win_resize,
        }

    def health_handlers(self) -> dict[str, Handler]:
        return {"Check": self.check, "Version": self.version}

    def extension_handlers(self) -> dict[str, Handler]:
        return {
            "ListProcesses": self.list_processes,
            "SignalContainer": self.signal_container,
            "UpdateMirror": self.update_mirror,
            "RemoveMirror": self.remove_mirror,
            "NextNames": self.next_names,
            "AnswerName": self.answer_name,
            "ListenSocket": self.listen_socket,
            "AcceptConnection": self.accept_connection,
            "CloseSocket": self.close_socket,
            "LimitProcessors": self.limit_processors,
            "ConnectPort": self.connect_port,
            "MirrorNetwork": self.mirror_network,
        }

    async def _finish(self, work: Coroutine[object, object, None]) -> Empty:
        """Do the work to its end, whether or not somebody still waits for the answer."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return Empty()

    # grpc.Health

    async def check(self, request: health_pb2.CheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(self, request: health_pb2.CheckRequest, call: Call) -> health_pb2.VersionCheckResponse:
        return health_pb2.VersionCheckResponse(
            grpc_version=TTRPC_PROTOCOL_VERSION, agent_version=machine.version()
        )

    # The sandbox and the machine

    async def create_sandbox(self, request: agent_pb2.CreateSandboxRequest, call: Call) -> Empty:
        refuse_nul(request)

        async def create() -> None:
            await self._find_disks(request.storages)
            await self._sandbox.create(request)
            self._log.info("sandbox_created", sandbox=self._sandbox.id)

        return await self._finish(create())

    async def destroy_sandbox(self, request: agent_pb2.DestroySandboxRequest, call: Call) -> Empty:
        return await self._finish(self._sandbox.destroy())

    async def get_guest_details(
        self, request: agent_pb2.GuestDetailsRequest, call: Call
    ) -> agent_pb2.GuestDetailsResponse:
        details = agent_pb2.AgentDetails(
            version=machine.version(),
            init_daemon=os.getpid() == 1,
            device_handlers=DEVICE_HANDLERS,
            storage_handlers=self._sandbox.storages.drivers,
            supports_seccomp=True,
            extra_features=EXTRA_FEATURES,
        )
        return agent_pb2.GuestDetailsResponse(
            agent_details=details,
            mem_block_size_bytes=machine.memory_block_bytes() if request.mem_block_size else 0,
            support_mem_hotplug_probe=request.mem_hotplug_probe and machine.can_probe_memory(),
        )

    async def set_guest_date_time(self, request: agent_pb2.SetGuestDateTimeRequest, call: Call) -> Empty:
        machine.set_clock(request.Sec, request.Usec)
        return Empty()

    async def reseed_random_dev(self, request: agent_pb2.ReseedRandomDevRequest, call: Call) -> Empty:
        machine.reseed(request.data)
        return Empty()

    async def online_cpu_mem(self, request: agent_pb2.OnlineCPUMemRequest, call: Call) -> Empty:
        memory = not request.cpu_only
        wanted = request.nb_cpus
        if machine.bring_online(wanted, memory) < wanted and request.wait:
            async with asyncio.timeout(self._settings.hotplug_timeout_s):
                await self._uevents.until(lambda: machine.bring_online(wanted, memory) >= wanted)
        return Empty()

    async def update_interface(
        self, request: agent_pb2.UpdateInterfaceRequest, call: Call
    ) -> types_pb2.Interface:
        from guest_agent import network

        refuse_nul(request)
        self._sandbox.load_driver("virtio_net")
        with suppress(NotFound):
            return network.update_interface(request.interface)
        mac = request.interface.hwAddr.lower()
        # The host may have plugged the device in a moment ago.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.hotplug_timeout_s):
                await self._uevents.until(lambda: network.find(mac) is not None)
        return network.update_interface(request.interface)

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest, call: Call) -> agent_pb2.Routes:
        from guest_agent import network

        refuse_nul(request)
        return network.update_routes(request.routes.Routes)

    async def list_interfaces(
        self, request: agent_pb2.ListInterfacesRequest, call: Call
    ) -> agent_pb2.Interfaces:
        from guest_agent import network

        return network.interfaces()

    async def list_routes(self, request: agent_pb2.ListRoutesRequest, call: Call) -> agent_pb2.Routes:
        from guest_agent import network

        return network.current_routes()

    async def add_arp_neighbors(self, request: agent_pb2.AddARPNeighborsRequest, call: Call) -> Empty:
        from guest_agent import network

        refuse_nul(request)
        network.add_neighbours(request.neighbors.ARPNeighbors)
        return Empty()

    async def copy_file(self, request: agent_pb2.CopyFileRequest, call: Call) -> Empty:
        from guest_agent import files

        files.copy(request)
        return Empty()

    async def update_ephemeral_mounts(
        self, request: agent_pb2.UpdateEphemeralMountsRequest, call: Call
    ) -> Empty:
        refuse_nul(request)
        for storage in request.storages:
            self._sandbox.storages.remount(storage)
        return Empty()

    async def get_metrics(self, request: agent_pb2.GetMetricsRequest, call: Call) -> agent_pb2.Metrics:
        from guest_agent import stats

        return agent_pb2.Metrics(metrics=stats.metrics(self._sandbox.running))

    async def get_volume_stats(
        self, request: agent_pb2.VolumeStatsRequest, call: Call
    ) -> csi_pb2.VolumeStatsResponse:
        from guest_agent import stats

        refuse_nul(request)
        return await in_thread(partial(stats.volume_stats, request.volume_guest_path))

    async def resize_volume(self, request: agent_pb2.ResizeVolumeRequest, call: Call) -> Empty:
        from guest_agent import resize
        from guest_agent.hardware import HardwareFinder

        refuse_nul(request)
        self._sandbox.storages.check_disk(request.volume_guest_path)
        disk = resize.Disk(request.volume_guest_path)
        disk.look_again()
        finder = HardwareFinder(
            self._uevents, self._sandbox.load_driver, patience_s=self._settings.hotplug_timeout_s
        )
        await finder.until(lambda: disk.size_bytes >= request.size, f"a disk of {request.size} bytes")
        return await self._finish(in_thread(partial(disk.grow, request.size)))

    async def get_diagnostic_data(
        self, request: agent_pb2.GetDiagnosticDataRequest, call: Call
    ) -> agent_pb2.GetDiagnosticDataResponse:
        if request.log_type != "termination_log":
            raise NotSupported(f"diagnostic data of type {request.log_type!r}")
        path = self._sandbox.container(request.container_id).termination_log
        if path is None:
            raise NotFound(f"container {request.container_id} has no termination log")
        with open(path, "rb") as file:
            data = file.read(MAX_DIAGNOSTIC_BYTES)
        return agent_pb2.GetDiagnosticDataResponse(data=data.decode(errors="replace"))

    async def get_oom_event(self, request: agent_pb2.GetOOMEventRequest, call: Call) -> agent_pb2.OOMEvent:
        return agent_pb2.OOMEvent(container_id=await self._sandbox.oom_reports.next())

    # Containers

    async def create_container(self, request: agent_pb2.CreateContainerRequest, call: Call) -> Empty:
        refuse_nul(request)

        async def create() -> None:
            await self._find_disks(request.storages, request)
            if any(device.type in PASSED_THROUGH for device in request.devices):
                await self._hand_out(request)
            await self._sandbox.create_container(request)

        return await self._finish(create())

    async def _find_disks(
        self,
        storages: Sequence[agent_pb2.Storage],
        request: agent_pb2.CreateContainerRequest | None = None,
    ) -> None:
        """Put what the guest calls its disks in place of their addresses."""
        devices = request.devices if request is not None else ()
        if not any(storage.driver in DISKS for storage in storages) and not any(
            device.type in DISKS for device in devices
        ):
            return
        from guest_agent import disks

        patience_s = self._settings.hotplug_timeout_s
        finder = disks.Finder(self._uevents, self._sandbox.load_driver, patience_s=patience_s)
        await disks.locate(storages, finder)
        if request is not None:
            await disks.hand_out(request, finder)

    async def add_swap(self, request: agent_pb2.AddSwapRequest, call: Call) -> Empty:
        from guest_agent import disks

        patience_s = self._settings.hotplug_timeout_s
        finder = disks.Finder(self._uevents, self._sandbox.load_driver, patience_s=patience_s)
        address = "/".join(f"{slot:02x}" for slot in request.PCIPath)

        async def add() -> None:
            disks.swap_on(await finder.find("blk", address))

        return await self._finish(add())

    async def add_swap_path(self, request: agent_pb2.AddSwapPathRequest, call: Call) -> Empty:
        from guest_agent import disks

        refuse_nul(request)
        disks.swap_on(request.path)
        return Empty()

    async def _hand_out(self, request: agent_pb2.CreateContainerRequest) -> None:
        from guest_agent import passthrough

        patience_s = self._settings.hotplug_timeout_s
        finder = passthrough.Finder(self._uevents, self._sandbox.load_driver, patience_s=patience_s)
        await passthrough.hand_out(request, finder)

    async def start_container(self, request: agent_pb2.StartContainerRequest, call: Call) -> Empty:
        container = self._sandbox.container(request.container_id)

        async def start() -> None:
            async with container.lock:
                await container.start()

        return await self._finish(start())

    async def remove_container(self, request: agent_pb2.RemoveContainerRequest, call: Call) -> Empty:
        return await self._finish(
            self._sandbox.remove_container(request.container_id, request.timeout or None)
        )

    async def update_container(self, request: agent_pb2.UpdateContainerRequest, call: Call) -> Empty:
        from agent_proto.oci_json import to_json

        refuse_nul(request)
        container = self._sandbox.container(request.container_id)
        resources = to_json(request.resources)
        drop_v1_limits(resources)

        async def update() -> None:
            async with container.lock:
                await container.update(resources)

        return await self._finish(update())

    async def stats_container(
        self, request: agent_pb2.StatsContainerRequest, call: Call
    ) -> agent_pb2.StatsContainerResponse:
        from guest_agent import stats

        return stats.container_stats(self._sandbox.container(request.container_id).cgroup)

    async def pause_container(self, request: agent_pb2.PauseContainerRequest, call: Call) -> Empty:
        return await self._pause(request.container_id, True)

    async def resume_container(self, request: agent_pb2.ResumeContainerRequest, call: Call) -> Empty:
        return await self._pause(request.container_id, False)

    async def _pause(self, container_id: str, paused: bool) -> Empty:
        container = self._sandbox.container(container_id)

        async def pause() -> None:
            async with container.lock:
                await container.pause(paused)

        return await self._finish(pause())

    # Processes

    async def exec_process(self, request: agent_pb2.ExecProcessRequest, call: Call) -> Empty:
        from agent_proto.oci_json import to_json

        if not request.HasField("process") or not request.process.Args:
            raise InvalidRequest("exec needs a process with arguments")
        refuse_nul(request)
        refuse_unsupported(request, f"exec {request.exec_id}")
        container = self._sandbox.container(request.container_id)
        process = to_json(request.process)
        drop_missing_security(process)

        async def execute() -> None:
            async with container.lock:
                await container.exec(request.exec_id, process)

        return await self._finish(execute())

    async def signal_process(self, request: agent_pb2.SignalProcessRequest, call: Call) -> Empty:
        _check_signal(request.signal)
        self._sandbox.container(request.container_id).signal(request.exec_id, request.signal)
        return Empty()

    async def wait_process(
        self, request: agent_pb2.WaitProcessRequest, call: Call
    ) -> agent_pb2.WaitProcessResponse:
        status = await self._sandbox.wait(request.container_id, request.exec_id)
        return agent_pb2.WaitProcessResponse(status=status)

    async def write_stdin(
        self, request: agent_pb2.WriteStreamRequest, call: Call
    ) -> agent_pb2.WriteStreamResponse:
        stdio = self._sandbox.process(request.container_id, request.exec_id).stdio
        written = 0
        if not request.data:
            stdio.close_stdin()
        elif stdio.stdin is not None:
            written = await stdio.stdin.write(request.data)
        return agent_pb2.WriteStreamResponse(len=written)

    async def close_stdin(self, request: agent_pb2.CloseStdinRequest, call: Call) -> Empty:
        self._sandbox.process(request.container_id, request.exec_id).stdio.close_stdin()
        return Empty()

    async def read_stdout(
        self, request: agent_pb2.ReadStreamRequest, call: Call
    ) -> agent_pb2.ReadStreamResponse:
        stream = self._sandbox.process(request.container_id, request.exec_id).stdio.stdout
        return agent_pb2.ReadStreamResponse(
            data=await stream.read(request.len) if stream is not None else b""
        )

    async def read_stderr(
        self, request: agent_pb2.ReadStreamRequest, call: Call
    ) -> agent_pb2.ReadStreamResponse:
        stream = self._sandbox.process(request.container_id, request.exec_id).stdio.stderr
        return agent_pb2.ReadStreamResponse(
            data=await stream.read(request.len) if stream is not None else b""
        )

    async def tty_win_resize(self, request: agent_pb2.TtyWinResizeRequest, call: Call) -> Empty:
        stdio = self._sandbox.process(request.container_id, request.exec_id).stdio
        stdio.resize(request.row, request.column)
        return Empty()

    # Extensions

    async def list_processes(
        self, request: kata_py_agent_pb2.ListProcessesRequest, call: Call
    ) -> kata_py_agent_pb2.ListProcessesResponse:
        response = kata_py_agent_pb2.ListProcessesResponse()
        for pid, exec_id in self._sandbox.container(request.container_id).processes():
            response.processes.add(pid=pid, exec_id=exec_id)
        return response

    async def signal_container(self, request: kata_py_agent_pb2.SignalContainerRequest, call: Call) -> Empty:
        _check_signal(request.signal)
        self._sandbox.container(request.container_id).cgroup.signal(request.signal)
        return Empty()

    async def update_mirror(self, request: kata_py_agent_pb2.UpdateMirrorRequest, call: Call) -> Empty:
        return await self._finish(self._sandbox.mirrors.update(request))

    async def remove_mirror(self, request: kata_py_agent_pb2.RemoveMirrorRequest, call: Call) -> Empty:
        return await self._finish(self._sandbox.mirrors.remove(request.name))

    async def next_names(
        self, request: kata_py_agent_pb2.NextNamesRequest, call: Call
    ) -> kata_py_agent_pb2.NextNamesResponse:
        self._sandbox.names.listen(request.address, request.port)
        return kata_py_agent_pb2.NextNamesResponse(
            questions=[
                kata_py_agent_pb2.NameQuestion(number=number, by_tcp=by_tcp, message=message)
                for number, by_tcp, message in await self._sandbox.names.next(wait=request.wait)
            ]
        )

    async def answer_name(self, request: kata_py_agent_pb2.AnswerNameRequest, call: Call) -> Empty:
        self._sandbox.names.answer(request.number, request.message)
        return Empty()

    async def listen_socket(self, request: kata_py_agent_pb2.ListenSocketRequest, call: Call) -> Empty:
        self._sandbox.host_sockets.listen(request.name, request.mode, request.uid, request.gid)
        return Empty()

    async def accept_connection(
        self, request: kata_py_agent_pb2.AcceptConnectionRequest, call: Call
    ) -> kata_py_agent_pb2.AcceptConnectionResponse:
        token = await self._sandbox.host_sockets.next_connection(request.name)
        return kata_py_agent_pb2.AcceptConnectionResponse(token=token)

    async def close_socket(self, request: kata_py_agent_pb2.CloseSocketRequest, call: Call) -> Empty:
        self._sandbox.host_sockets.close(request.name)
        return Empty()

    async def limit_processors(self, request: kata_py_agent_pb2.LimitProcessorsRequest, call: Call) -> Empty:
        machine.take_offline(request.online)
        return Empty()

    async def connect_port(
        self, request: kata_py_agent_pb2.ConnectPortRequest, call: Call
    ) -> kata_py_agent_pb2.ConnectPortResponse:
        from guest_agent import ports

        token = await ports.connect(request.port, self._sandbox.handover)
        return kata_py_agent_pb2.ConnectPortResponse(token=token)

    async def mirror_network(self, request: kata_py_agent_pb2.MirrorNetworkRequest, call: Call) -> Empty:
        from guest_agent.routing import NetworkMirror

        refuse_nul(request)
        self._mirror = self._mirror or NetworkMirror()
        self._mirror.update(request)
        return Empty()


def _check_signal(number: int) -> None:
    if not 1 <= number <= 64:
        raise InvalidRequest(f"{number} is no signal")

"""The host's side of the agent's services: one typed method per call.

Messages go in and come out as they are on the wire; turning them into the domain's words, and deciding what
a failure means, is the caller's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from agent_proto import services
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.message import Message

    from agent_proto.gen import agent_pb2 as pb
    from agent_proto.gen import csi_pb2, health_pb2, kata_py_agent_pb2, types_pb2
    from ttrpc import Client, Method

Request = TypeVar("Request", bound="Message")
Response = TypeVar("Response", bound="Message")

CALL_TIMEOUT_S = 60.0
"""For calls that an agent answers without waiting for a workload; Kata's Go runtime allows the same."""

CREATE_CONTAINER_TIMEOUT_S = 60.0
"""For CreateContainer, in which the guest may pull an image or format a disk: `create_container_timeout`."""

_ERROR_TEXT_LIMIT = 1000
# In characters. An agent's error goes to logs and terminals: a guest may neither flood nor steer them.

NO_TIMEOUT = None
"""For calls that end when the workload does something: write, read, exit, run out of memory. And for the health check,
whose caller has a limit of its own: what silence means is up to it."""


class AgentGone(ConnectionClosed):
    """The connection to the agent was or went away."""

    def __init__(self) -> None:
        RpcError.__init__(
            self,
            Code.UNAVAILABLE,
            "the guest's agent is gone: its virtual machine ends; the shim's log tells why",
        )


class AgentClient:
    """Calls one agent over a connection that the caller owns and closes.

    Any number of calls may run at once. Every method raises ttrpc.RpcError with the agent's code and text (made
    one printable line of at most 1000 characters), with Code.DEADLINE_EXCEEDED when the call's timeout passes,
    and AgentGone, which also ends the calls that have no timeout. A call given up on goes on in the guest:
    ttrpc cannot cancel it.
    """

    def __init__(
        self,
        client: Client,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        create_container_timeout_s: float = CREATE_CONTAINER_TIMEOUT_S,
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._create_container_timeout_s = create_container_timeout_s

    # Sandbox: once per virtual machine

    async def create_sandbox(self, request: pb.CreateSandboxRequest) -> Empty:
        return await self._agent(services.CREATE_SANDBOX, request, self._timeout_s)

    async def destroy_sandbox(self, request: pb.DestroySandboxRequest) -> Empty:
        return await self._agent(services.DESTROY_SANDBOX, request, self._timeout_s)

    async def get_guest_details(self, request: pb.GuestDetailsRequest) -> pb.GuestDetailsResponse:
        return await self._agent(services.GET_GUEST_DETAILS, request, self._timeout_s)

    async def set_policy(self, request: pb.SetPolicyRequest) -> Empty:
        return await self._agent(services.SET_POLICY, request, self._timeout_s)

    async def set_guest_date_time(self, request: pb.SetGuestDateTimeRequest) -> Empty:
        return await self._agent(services.SET_GUEST_DATE_TIME, request, self._timeout_s)

    async def reseed_random_dev(self, request: pb.ReseedRandomDevRequest) -> Empty:
        return await self._agent(services.RESEED_RANDOM_DEV, request, self._timeout_s)

    async def get_oom_event(self, request: pb.GetOOMEventRequest) -> pb.OOMEvent:
        """Wait for the next container that runs out of memory; to be called again after each answer."""
        return await self._agent(services.GET_OOM_EVENT, request, NO_TIMEOUT)

    async def get_metrics(self, request: pb.GetMetricsRequest) -> pb.Metrics:
        return await self._agent(services.GET_METRICS, request, self._timeout_s)

    async def get_diagnostic_data(self, request: pb.GetDiagnosticDataRequest) -> pb.GetDiagnosticDataResponse:
        """Agents before Kata 4.1 answer UNIMPLEMENTED."""
        return await self._agent(services.GET_DIAGNOSTIC_DATA, request, self._timeout_s)

    # Containers

    async def create_container(self, request: pb.CreateContainerRequest) -> Empty:
        """Mount what the container needs and set up its init, which then waits for start_container."""
        return await self._agent(services.CREATE_CONTAINER, request, self._create_container_timeout_s)

    async def start_container(self, request: pb.StartContainerRequest) -> Empty:
        return await self._agent(services.START_CONTAINER, request, self._timeout_s)

    async def remove_container(self, request: pb.RemoveContainerRequest) -> Empty:
        return await self._agent(services.REMOVE_CONTAINER, request, self._timeout_s)

    async def update_container(self, request: pb.UpdateContainerRequest) -> Empty:
        return await self._agent(services.UPDATE_CONTAINER, request, self._timeout_s)

    async def update_ephemeral_mounts(self, request: pb.UpdateEphemeralMountsRequest) -> Empty:
        return await self._agent(services.UPDATE_EPHEMERAL_MOUNTS, request, self._timeout_s)

    async def stats_container(self, request: pb.StatsContainerRequest) -> pb.StatsContainerResponse:
        return await self._agent(services.STATS_CONTAINER, request, self._timeout_s)

    async def pause_container(self, request: pb.PauseContainerRequest) -> Empty:
        return await self._agent(services.PAUSE_CONTAINER, request, self._timeout_s)

    async def resume_container(self, request: pb.ResumeContainerRequest) -> Empty:
        return await self._agent(services.RESUME_CONTAINER, request, self._timeout_s)

    async def remove_stale_virtiofs_share_mounts(
        self, request: pb.RemoveStaleVirtiofsShareMountsRequest
    ) -> Empty:
        return await self._agent(services.REMOVE_STALE_VIRTIOFS_SHARE_MOUNTS, request, self._timeout_s)

    # Processes of a container

    async def exec_process(self, request: pb.ExecProcessRequest) -> Empty:
        """Start a further process in a running container."""
        return await self._agent(services.EXEC_PROCESS, request, self._timeout_s)

    async def signal_process(self, request: pb.SignalProcessRequest) -> Empty:
        """Send a signal. SIGKILL with an empty exec_id goes to every process of the container."""
        return await self._agent(services.SIGNAL_PROCESS, request, self._timeout_s)

    async def wait_process(self, request: pb.WaitProcessRequest) -> pb.WaitProcessResponse:
        """Wait for the end of a process; the reply carries its exit status."""
        return await self._agent(services.WAIT_PROCESS, request, NO_TIMEOUT)

    async def write_stdin(self, request: pb.WriteStreamRequest) -> pb.WriteStreamResponse:
        """Write to a process; no data closes its standard input. Waits while the pipe is full."""
        return await self._agent(services.WRITE_STDIN, request, NO_TIMEOUT)

    async def read_stdout(self, request: pb.ReadStreamRequest) -> pb.ReadStreamResponse:
        """Wait for output. No data is the end of the stream; agents before Kata 4.1 fail instead (`eof`)."""
        return await self._agent(services.READ_STDOUT, request, NO_TIMEOUT)

    async def read_stderr(self, request: pb.ReadStreamRequest) -> pb.ReadStreamResponse:
        """As read_stdout, where a process with a terminal has all its output."""
        return await self._agent(services.READ_STDERR, request, NO_TIMEOUT)

    async def close_stdin(self, request: pb.CloseStdinRequest) -> Empty:
        return await self._agent(services.CLOSE_STDIN, request, self._timeout_s)

    async def tty_win_resize(self, request: pb.TtyWinResizeRequest) -> Empty:
        return await self._agent(services.TTY_WIN_RESIZE, request, self._timeout_s)

    # Network

    async def update_interface(self, request: pb.UpdateInterfaceRequest) -> types_pb2.Interface:
        return await self._agent(services.UPDATE_INTERFACE, request, self._timeout_s)

    async def update_routes(self, request: pb.UpdateRoutesRequest) -> pb.Routes:
        """Replace all routes; the reply lists the routes that are then set."""
        return await self._agent(services.UPDATE_ROUTES, request, self._timeout_s)

    async def list_interfaces(self, request: pb.ListInterfacesRequest) -> pb.Interfaces:
        return await self._agent(services.LIST_INTERFACES, request, self._timeout_s)

    async def list_routes(self, request: pb.ListRoutesRequest) -> pb.Routes:
        return await self._agent(services.LIST_ROUTES, request, self._timeout_s)

    async def add_arp_neighbors(self, request: pb.AddARPNeighborsRequest) -> Empty:
        return await self._agent(services.ADD_ARP_NEIGHBORS, request, self._timeout_s)

    async def get_iptables(self, request: pb.GetIPTablesRequest) -> pb.GetIPTablesResponse:
        return await self._agent(services.GET_IPTABLES, request, self._timeout_s)

    async def set_iptables(self, request: pb.SetIPTablesRequest) -> pb.SetIPTablesResponse:
        return await self._agent(services.SET_IPTABLES, request, self._timeout_s)

    # Processors, memory, swap

    async def online_cpu_mem(self, request: pb.OnlineCPUMemRequest) -> Empty:
        """Bring processors and memory online that were plugged into the machine."""
        return await self._agent(services.ONLINE_CPU_MEM, request, self._timeout_s)

    async def mem_hotplug_by_probe(self, request: pb.MemHotplugByProbeRequest) -> Empty:
        return await self._agent(services.MEM_HOTPLUG_BY_PROBE, request, self._timeout_s)

    async def add_swap(self, request: pb.AddSwapRequest) -> Empty:
        return await self._agent(services.ADD_SWAP, request, self._timeout_s)

    async def add_swap_path(self, request: pb.AddSwapPathRequest) -> Empty:
        return await self._agent(services.ADD_SWAP_PATH, request, self._timeout_s)

    async def mem_agent_memcg_set(self, request: pb.MemAgentMemcgConfig) -> Empty:
        return await self._agent(services.MEM_AGENT_MEMCG_SET, request, self._timeout_s)

    async def mem_agent_compact_set(self, request: pb.MemAgentCompactConfig) -> Empty:
        return await self._agent(services.MEM_AGENT_COMPACT_SET, request, self._timeout_s)

    # Files and volumes

    async def copy_file(self, request: pb.CopyFileRequest) -> Empty:
        """Send one piece of a file; a message must stay below ttrpc's 4 MiB."""
        return await self._agent(services.COPY_FILE, request, self._timeout_s)

    async def get_volume_stats(self, request: pb.VolumeStatsRequest) -> csi_pb2.VolumeStatsResponse:
        return await self._agent(services.GET_VOLUME_STATS, request, self._timeout_s)

    async def resize_volume(self, request: pb.ResizeVolumeRequest) -> Empty:
        """Grow a volume's file system to the size that its disk has by now; Kata's agents answer UNIMPLEMENTED."""
        return await self._agent(services.RESIZE_VOLUME, request, self._timeout_s)

    # Health

    async def check(self, request: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        """Ask whether the agent serves; works before there is a sandbox."""
        return await self._health(services.CHECK, request, NO_TIMEOUT)

    async def version(self, request: health_pb2.CheckRequest) -> health_pb2.VersionCheckResponse:
        return await self._health(services.VERSION, request, self._timeout_s)

    # Extensions: only for an agent whose extra features have services.EXTENSIONS_FEATURE

    async def list_processes(
        self, request: kata_py_agent_pb2.ListProcessesRequest
    ) -> kata_py_agent_pb2.ListProcessesResponse:
        """The processes that live in a container now, by their pids in the guest."""
        return await self._extension(services.LIST_PROCESSES, request, self._timeout_s)

    async def signal_container(self, request: kata_py_agent_pb2.SignalContainerRequest) -> Empty:
        """Send a signal to every process of a container; no process left is no error."""
        return await self._extension(services.SIGNAL_CONTAINER, request, self._timeout_s)

    async def update_mirror(self, request: kata_py_agent_pb2.UpdateMirrorRequest) -> Empty:
        """Send one piece of a directory that the guest keeps a copy of. Our first agents answer UNIMPLEMENTED."""
        return await self._extension(services.UPDATE_MIRROR, request, self._timeout_s)

    async def remove_mirror(self, request: kata_py_agent_pb2.RemoveMirrorRequest) -> Empty:
        """Let the guest forget such a copy."""
        return await self._extension(services.REMOVE_MIRROR, request, self._timeout_s)

    async def next_names(
        self, request: kata_py_agent_pb2.NextNamesRequest
    ) -> kata_py_agent_pb2.NextNamesResponse:
        """Wait for DNS questions of the guest's programs; to be called again after each answer."""
        return await self._extension(services.NEXT_NAMES, request, NO_TIMEOUT)

    async def answer_name(self, request: kata_py_agent_pb2.AnswerNameRequest) -> Empty:
        """Answer one of them."""
        return await self._extension(services.ANSWER_NAME, request, self._timeout_s)

    async def listen_socket(self, request: kata_py_agent_pb2.ListenSocketRequest) -> Empty:
        """Make a socket in the guest that stands for one of the host."""
        return await self._extension(services.LISTEN_SOCKET, request, self._timeout_s)

    async def accept_connection(
        self, request: kata_py_agent_pb2.AcceptConnectionRequest
    ) -> kata_py_agent_pb2.AcceptConnectionResponse:
        """Wait for the next program of the guest that connects to such a socket."""
        return await self._extension(services.ACCEPT_CONNECTION, request, NO_TIMEOUT)

    async def close_socket(self, request: kata_py_agent_pb2.CloseSocketRequest) -> Empty:
        """Remove such a socket."""
        return await self._extension(services.CLOSE_SOCKET, request, self._timeout_s)

    async def limit_processors(self, request: kata_py_agent_pb2.LimitProcessorsRequest) -> Empty:
        """Take processors from the guest's programs."""
        return await self._extension(services.LIMIT_PROCESSORS, request, self._timeout_s)

    async def connect_port(
        self, request: kata_py_agent_pb2.ConnectPortRequest
    ) -> kata_py_agent_pb2.ConnectPortResponse:
        """Connect to a TCP port of the guest's loopback."""
        return await self._extension(services.CONNECT_PORT, request, self._timeout_s)

    async def mirror_network(self, request: kata_py_agent_pb2.MirrorNetworkRequest) -> Empty:
        """Make the guest's addresses, routes, rules and neighbours the pod's. Our first agents answer UNIMPLEMENTED."""
        return await self._extension(services.MIRROR_NETWORK, request, self._timeout_s)

    async def _agent(
        self, method: Method[Request, Response], request: Request, timeout_s: float | None
    ) -> Response:
        return await self._call(services.AGENT.name, method, request, timeout_s)

    async def _health(
        self, method: Method[Request, Response], request: Request, timeout_s: float | None
    ) -> Response:
        return await self._call(services.HEALTH.name, method, request, timeout_s)

    async def _extension(
        self, method: Method[Request, Response], request: Request, timeout_s: float | None
    ) -> Response:
        return await self._call(services.EXTENSIONS.name, method, request, timeout_s)

    async def _call(
        self, service: str, method: Method[Request, Response], request: Request, timeout_s: float | None
    ) -> Response:
        try:
            return await self._client.call(service, method, request, timeout_s=timeout_s)
        except ConnectionClosed as err:
            raise AgentGone from err
        except RpcError as err:
            text = _one_line(err.message)
            if err.code is Code.DEADLINE_EXCEEDED and timeout_s is not None:
                text = f"the guest's agent has not answered {method.name} within {timeout_s:g} s: {text}"
            raise RpcError(err.code, text) from err


def _one_line(text: str) -> str:
    words = " ".join(text[: 4 * _ERROR_TEXT_LIMIT].split())
    return "".join(c if c.isprintable() else "?" for c in words[:_ERROR_TEXT_LIMIT])

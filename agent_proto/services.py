"""The agent's services described for ttrpc: what the host calls and the guest serves.

A method is a constant so that a caller's request and reply are type-checked; the meaning of each call is
said in protos/*.proto, which these tables repeat (a test compares them).
"""

from google.protobuf.empty_pb2 import Empty

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import csi_pb2, health_pb2, kata_py_agent_pb2, types_pb2
from ttrpc import Method, Service

# Sandbox: once per virtual machine
CREATE_SANDBOX = Method("CreateSandbox", pb.CreateSandboxRequest, Empty)
DESTROY_SANDBOX = Method("DestroySandbox", pb.DestroySandboxRequest, Empty)
GET_GUEST_DETAILS = Method("GetGuestDetails", pb.GuestDetailsRequest, pb.GuestDetailsResponse)
SET_POLICY = Method("SetPolicy", pb.SetPolicyRequest, Empty)
SET_GUEST_DATE_TIME = Method("SetGuestDateTime", pb.SetGuestDateTimeRequest, Empty)
RESEED_RANDOM_DEV = Method("ReseedRandomDev", pb.ReseedRandomDevRequest, Empty)
GET_OOM_EVENT = Method("GetOOMEvent", pb.GetOOMEventRequest, pb.OOMEvent)
GET_METRICS = Method("GetMetrics", pb.GetMetricsRequest, pb.Metrics)
GET_DIAGNOSTIC_DATA = Method("GetDiagnosticData", pb.GetDiagnosticDataRequest, pb.GetDiagnosticDataResponse)

# Containers
CREATE_CONTAINER = Method("CreateContainer", pb.CreateContainerRequest, Empty)
START_CONTAINER = Method("StartContainer", pb.StartContainerRequest, Empty)
REMOVE_CONTAINER = Method("RemoveContainer", pb.RemoveContainerRequest, Empty)
UPDATE_CONTAINER = Method("UpdateContainer", pb.UpdateContainerRequest, Empty)
UPDATE_EPHEMERAL_MOUNTS = Method("UpdateEphemeralMounts", pb.UpdateEphemeralMountsRequest, Empty)
STATS_CONTAINER = Method("StatsContainer", pb.StatsContainerRequest, pb.StatsContainerResponse)
PAUSE_CONTAINER = Method("PauseContainer", pb.PauseContainerRequest, Empty)
RESUME_CONTAINER = Method("ResumeContainer", pb.ResumeContainerRequest, Empty)
REMOVE_STALE_VIRTIOFS_SHARE_MOUNTS = Method(
    "RemoveStaleVirtiofsShareMounts", pb.RemoveStaleVirtiofsShareMountsRequest, Empty
)

# Processes of a container
EXEC_PROCESS = Method("ExecProcess", pb.ExecProcessRequest, Empty)
SIGNAL_PROCESS = Method("SignalProcess", pb.SignalProcessRequest, Empty)
WAIT_PROCESS = Method("WaitProcess", pb.WaitProcessRequest, pb.WaitProcessResponse)
WRITE_STDIN = Method("WriteStdin", pb.WriteStreamRequest, pb.WriteStreamResponse)
READ_STDOUT = Method("ReadStdout", pb.ReadStreamRequest, pb.ReadStreamResponse)
READ_STDERR = Method("ReadStderr", pb.ReadStreamRequest, pb.ReadStreamResponse)
CLOSE_STDIN = Method("CloseStdin", pb.CloseStdinRequest, Empty)
TTY_WIN_RESIZE = Method("TtyWinResize", pb.TtyWinResizeRequest, Empty)

# Network
UPDATE_INTERFACE = Method("UpdateInterface", pb.UpdateInterfaceRequest, types_pb2.Interface)
UPDATE_ROUTES = Method("UpdateRoutes", pb.UpdateRoutesRequest, pb.Routes)
LIST_INTERFACES = Method("ListInterfaces", pb.ListInterfacesRequest, pb.Interfaces)
LIST_ROUTES = Method("ListRoutes", pb.ListRoutesRequest, pb.Routes)
ADD_ARP_NEIGHBORS = Method("AddARPNeighbors", pb.AddARPNeighborsRequest, Empty)
GET_IPTABLES = Method("GetIPTables", pb.GetIPTablesRequest, pb.GetIPTablesResponse)
SET_IPTABLES = Method("SetIPTables", pb.SetIPTablesRequest, pb.SetIPTablesResponse)

# Processors, memory, swap
ONLINE_CPU_MEM = Method("OnlineCPUMem", pb.OnlineCPUMemRequest, Empty)
MEM_HOTPLUG_BY_PROBE = Method("MemHotplugByProbe", pb.MemHotplugByProbeRequest, Empty)
ADD_SWAP = Method("AddSwap", pb.AddSwapRequest, Empty)
ADD_SWAP_PATH = Method("AddSwapPath", pb.AddSwapPathRequest, Empty)
MEM_AGENT_MEMCG_SET = Method("MemAgentMemcgSet", pb.MemAgentMemcgConfig, Empty)
MEM_AGENT_COMPACT_SET = Method("MemAgentCompactSet", pb.MemAgentCompactConfig, Empty)

# Files and volumes
COPY_FILE = Method("CopyFile", pb.CopyFileRequest, Empty)
GET_VOLUME_STATS = Method("GetVolumeStats", pb.VolumeStatsRequest, csi_pb2.VolumeStatsResponse)
RESIZE_VOLUME = Method("ResizeVolume", pb.ResizeVolumeRequest, Empty)

AGENT = Service(
    "grpc.AgentService",
    (
        CREATE_SANDBOX,
        DESTROY_SANDBOX,
        GET_GUEST_DETAILS,
        SET_POLICY,
        SET_GUEST_DATE_TIME,
        RESEED_RANDOM_DEV,
        GET_OOM_EVENT,
        GET_METRICS,
        GET_DIAGNOSTIC_DATA,
        CREATE_CONTAINER,
        START_CONTAINER,
        REMOVE_CONTAINER,
        UPDATE_CONTAINER,
        UPDATE_EPHEMERAL_MOUNTS,
        STATS_CONTAINER,
        PAUSE_CONTAINER,
        RESUME_CONTAINER,
        REMOVE_STALE_VIRTIOFS_SHARE_MOUNTS,
        EXEC_PROCESS,
        SIGNAL_PROCESS,
        WAIT_PROCESS,
        WRITE_STDIN,
        READ_STDOUT,
        READ_STDERR,
        CLOSE_STDIN,
        TTY_WIN_RESIZE,
        UPDATE_INTERFACE,
        UPDATE_ROUTES,
        LIST_INTERFACES,
        LIST_ROUTES,
        ADD_ARP_NEIGHBORS,
        GET_IPTABLES,
        SET_IPTABLES,
        ONLINE_CPU_MEM,
        MEM_HOTPLUG_BY_PROBE,
        ADD_SWAP,
        ADD_SWAP_PATH,
        MEM_AGENT_MEMCG_SET,
        MEM_AGENT_COMPACT_SET,
        COPY_FILE,
        GET_VOLUME_STATS,
        RESIZE_VOLUME,
    ),
)

CHECK = Method("Check", health_pb2.CheckRequest, health_pb2.HealthCheckResponse)
VERSION = Method("Version", health_pb2.CheckRequest, health_pb2.VersionCheckResponse)

HEALTH = Service("grpc.Health", (CHECK, VERSION))

# Only where the agent offers it
LIST_PROCESSES = Method(
    "ListProcesses", kata_py_agent_pb2.ListProcessesRequest, kata_py_agent_pb2.ListProcessesResponse
)
SIGNAL_CONTAINER = Method("SignalContainer", kata_py_agent_pb2.SignalContainerRequest, Empty)

UPDATE_MIRROR = Method("UpdateMirror", kata_py_agent_pb2.UpdateMirrorRequest, Empty)
REMOVE_MIRROR = Method("RemoveMirror", kata_py_agent_pb2.RemoveMirrorRequest, Empty)
NEXT_NAMES = Method("NextNames", kata_py_agent_pb2.NextNamesRequest, kata_py_agent_pb2.NextNamesResponse)
ANSWER_NAME = Method("AnswerName", kata_py_agent_pb2.AnswerNameRequest, Empty)
LISTEN_SOCKET = Method("ListenSocket", kata_py_agent_pb2.ListenSocketRequest, Empty)
ACCEPT_CONNECTION = Method(
    "AcceptConnection", kata_py_agent_pb2.AcceptConnectionRequest, kata_py_agent_pb2.AcceptConnectionResponse
)
CLOSE_SOCKET = Method("CloseSocket", kata_py_agent_pb2.CloseSocketRequest, Empty)
LIMIT_PROCESSORS = Method("LimitProcessors", kata_py_agent_pb2.LimitProcessorsRequest, Empty)
CONNECT_PORT = Method(
    "ConnectPort", kata_py_agent_pb2.ConnectPortRequest, kata_py_agent_pb2.ConnectPortResponse
)
MIRROR_NETWORK = Method("MirrorNetwork", kata_py_agent_pb2.MirrorNetworkRequest, Empty)

EXTENSIONS = Service(
    "kata_py.agent.v1.Extensions",
    (
        LIST_PROCESSES,
        SIGNAL_CONTAINER,
        UPDATE_MIRROR,
        REMOVE_MIRROR,
        LISTEN_SOCKET,
        ACCEPT_CONNECTION,
        CLOSE_SOCKET,
        CONNECT_PORT,
        NEXT_NAMES,
        ANSWER_NAME,
        LIMIT_PROCESSORS,
        MIRROR_NETWORK,
    ),
)

EXTENSIONS_FEATURE = kata_py_agent_pb2.DESCRIPTOR.package
"""The word among an agent's extra features that says it serves EXTENSIONS."""

"""`[agent.kata]`: how the shim talks to the program inside the guest, and what that program is told."""

from typing import Annotated

from config.schema.key import Byte, Count, LogLevel, Percent, Positive, Section, VsockPort, Wide, key


class MemAgent(Section, frozen=True):
    """`[agent.kata.mem_agent]`: reclaim and compaction of guest memory, by an agent that can; kata-py's own cannot.

    Unset keys are the guest's choice.
    """

    mem_agent_enable: Annotated[bool, key("now", "Run the memory agent inside the guest.")] = False
    enable: Annotated[bool, key("now", "Another name of `mem_agent_enable`.")] = False
    memcg_disable: Annotated[
        bool | None,
        key("now", "Turn reclaim from control groups off."),
    ] = None
    memcg_swap: Annotated[bool | None, key("now", "Let reclaim write to swap.")] = None
    memcg_swappiness_max: Annotated[
        Byte | None,
        key("now", "Highest swappiness that reclaim may use."),
    ] = None
    memcg_period_secs: Annotated[
        Wide | None,
        key("now", "Pause between reclaim rounds.", unit="s"),
    ] = None
    memcg_period_psi_percent_limit: Annotated[
        Percent | None,
        key(
            "now",
            "Memory pressure above which a reclaim round is skipped.",
            unit="%",
        ),
    ] = None
    memcg_eviction_psi_percent_limit: Annotated[
        Percent | None,
        key(
            "now",
            "Memory pressure above which eviction stops.",
            unit="%",
        ),
    ] = None
    memcg_eviction_run_aging_count_min: Annotated[
        Wide | None,
        key("now", "Aging rounds before pages are evicted."),
    ] = None
    compact_disable: Annotated[bool | None, key("now", "Turn memory compaction off.")] = None
    compact_period_secs: Annotated[
        Wide | None,
        key("now", "Pause between compaction rounds.", unit="s"),
    ] = None
    compact_period_psi_percent_limit: Annotated[
        Percent | None,
        key(
            "now",
            "Memory pressure above which a compaction round is skipped.",
            unit="%",
        ),
    ] = None
    compact_psi_percent_limit: Annotated[
        Percent | None,
        key(
            "now",
            "Memory pressure above which a running compaction ends.",
            unit="%",
        ),
    ] = None
    compact_sec_max: Annotated[
        Wide | None,
        key("now", "Longest compaction run.", unit="s"),
    ] = None
    compact_order: Annotated[
        Count | None,
        key("now", "Order of the free pages to look for."),
    ] = None
    compact_threshold: Annotated[
        Wide | None,
        key(
            "now",
            "Number of free blocks below which memory is compacted.",
        ),
    ] = None
    compact_force_times: Annotated[
        Wide | None,
        key(
            "now",
            "Rounds after which compaction happens in any case.",
        ),
    ] = None
    create_container_timeout: Annotated[
        int | None,
        key(
            "warned",
            "Accepted because some Kata 3.26 files have this key below the wrong header.",
            hint="move it up into [agent.kata]",
            why="it belongs to [agent.kata]",
        ),
    ] = None


class Agent(Section, frozen=True):
    """`[agent.kata]`."""

    enable_debug: Annotated[
        bool, key("now", "The agent logs at debug level. Raises `log_level` from info to debug.")
    ] = False
    enable_tracing: Annotated[
        bool,
        key(
            "now",
            "The agent records trace spans. kata-py's own has none to record and says so in its log, as for "
            "the other keys here that it has no use for.",
        ),
    ] = False
    kernel_modules: Annotated[
        tuple[str, ...],
        key(
            "now", "Modules that the agent loads before the first container, each as `name param=value ...`."
        ),
    ] = ()
    debug_console_enabled: Annotated[
        bool,
        key("now", "The agent offers a root shell on vsock port 1026. kata-py's own guest has no shell."),
    ] = False
    dial_timeout_ms: Annotated[
        Positive, key("now", "First pause between two attempts to reach the agent.", unit="ms")
    ] = 10
    reconnect_timeout_ms: Annotated[
        Positive,
        key(
            "ignored",
            "Time allowed to reach the agent. Not less than `dial_timeout_ms`.",
            unit="ms",
            why="the guest's progress decides how long it is waited for, see `boot_timeout_s`",
        ),
    ] = 3000
    create_container_timeout: Annotated[
        Positive, key("now", "Time allowed for a request to the agent that can take long.", unit="s")
    ] = 30
    launch_process_timeout: Annotated[
        Count,
        key(
            "now",
            "Limit of the agent's own start of helper programs; 0 is the guest's default. kata-py's own "
            "starts none.",
            unit="s",
        ),
    ] = 0
    cdh_api_timeout_ms: Annotated[
        Count,
        key(
            "now",
            "Limit of calls to the confidential data hub inside the guest, in whole seconds; 0 is the guest's"
            " default. kata-py's own has none.",
            unit="ms",
        ),
    ] = 50000
    log_level: Annotated[
        LogLevel,
        key(
            "now",
            "Least severe message of the agent that is logged on the host. The agent's log is brought there "
            "with `enable_debug`, here or of the machine, and with a level below info.",
        ),
    ] = "info"
    visible_cdi_devices: Annotated[
        bool,
        key(
            "now",
            "The agent shows containers the devices of their container device (CDI) annotations. kata-py's "
            "own does not.",
        ),
    ] = False
    server_port: Annotated[
        VsockPort,
        key("now", "vsock port on which the agent answers; it is told of another than the usual one."),
    ] = 1024
    log_port: Annotated[VsockPort, key("now", "vsock port of the agent's log stream.")] = 1025
    passfd_listener_port: Annotated[
        VsockPort,
        key(
            "ignored",
            "vsock port for passing standard I/O.",
            why="of other hypervisors, whose vsock is a Unix socket",
        ),
    ] = 1027
    health_check_request_timeout_ms: Annotated[
        Count,
        key(
            "now",
            "Time allowed for a health check. Health is asked for when a guest takes no notice of a SIGKILL.",
            unit="ms",
        ),
    ] = 5000
    container_pipe_size: Annotated[
        Count,
        key(
            "now",
            "Size of each container's output pipes in the guest; 0 is the kernel's default.",
            unit="bytes",
        ),
    ] = 0
    policy: Annotated[str, key("now", "Rego text that the agent enforces from the sandbox's start.")] = ""
    mem_agent: MemAgent = MemAgent()

    # Ours
    server_addr: Annotated[
        str,
        key(
            "now",
            "Where the agent answers: empty is the sandbox's own vsock; `unix:/path` is a host socket, "
            "for development without a guest. A key of kata-py's own.",
            hint='use "" or "unix:/absolute/path"',
        ),
    ] = ""

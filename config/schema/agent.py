"""`[agent.kata]`: how the shim talks to the program inside the guest, and what that program is told."""

from typing import Annotated

from config.schema.key import Byte, Count, LogLevel, Percent, Positive, Section, VsockPort, Wide, key


class MemAgent(Section, frozen=True):
    """`[agent.kata.mem_agent]`: reclaim and compaction of guest memory. Unset keys are the guest's choice."""

    mem_agent_enable: Annotated[bool, key("warned", "Run the memory agent inside the guest.")] = False
    enable: Annotated[bool, key("warned", "Another name of `mem_agent_enable`.")] = False
    memcg_disable: Annotated[bool | None, key("ignored", "Turn reclaim from control groups off.")] = None
    memcg_swap: Annotated[bool | None, key("ignored", "Let reclaim write to swap.")] = None
    memcg_swappiness_max: Annotated[
        Byte | None, key("ignored", "Highest swappiness that reclaim may use.")
    ] = None
    memcg_period_secs: Annotated[Wide | None, key("ignored", "Pause between reclaim rounds.", unit="s")] = (
        None
    )
    memcg_period_psi_percent_limit: Annotated[
        Percent | None, key("ignored", "Memory pressure above which a reclaim round is skipped.", unit="%")
    ] = None
    memcg_eviction_psi_percent_limit: Annotated[
        Percent | None, key("ignored", "Memory pressure above which eviction stops.", unit="%")
    ] = None
    memcg_eviction_run_aging_count_min: Annotated[
        Wide | None, key("ignored", "Aging rounds before pages are evicted.")
    ] = None
    compact_disable: Annotated[bool | None, key("ignored", "Turn memory compaction off.")] = None
    compact_period_secs: Annotated[
        Wide | None, key("ignored", "Pause between compaction rounds.", unit="s")
    ] = None
    compact_period_psi_percent_limit: Annotated[
        Percent | None, key("ignored", "Memory pressure above which a compaction round is skipped.", unit="%")
    ] = None
    compact_psi_percent_limit: Annotated[
        Percent | None, key("ignored", "Memory pressure above which a running compaction ends.", unit="%")
    ] = None
    compact_sec_max: Annotated[Wide | None, key("ignored", "Longest compaction run.", unit="s")] = None
    compact_order: Annotated[Count | None, key("ignored", "Order of the free pages to look for.")] = None
    compact_threshold: Annotated[
        Wide | None, key("ignored", "Number of free blocks below which memory is compacted.")
    ] = None
    compact_force_times: Annotated[
        Wide | None, key("ignored", "Rounds after which compaction happens in any case.")
    ] = None
    create_container_timeout: Annotated[
        int | None,
        key(
            "warned",
            "Accepted because some Kata 3.26 files have this key below the wrong header. It belongs to "
            "`[agent.kata]` and does nothing here.",
            hint="move it up into [agent.kata]",
        ),
    ] = None


class Agent(Section, frozen=True):
    """`[agent.kata]`."""

    enable_debug: Annotated[
        bool, key("now", "The agent logs at debug level. Raises `log_level` from info to debug.")
    ] = False
    enable_tracing: Annotated[bool, key("warned", "The agent records trace spans.")] = False
    kernel_modules: Annotated[
        tuple[str, ...],
        key(
            "now", "Modules that the agent loads before the first container, each as `name param=value ...`."
        ),
    ] = ()
    debug_console_enabled: Annotated[
        bool, key("warned", "The agent offers a root shell on a vsock port of its own.")
    ] = False
    dial_timeout_ms: Annotated[
        Positive, key("now", "First pause between two attempts to reach the agent.", unit="ms")
    ] = 10
    reconnect_timeout_ms: Annotated[
        Positive,
        key(
            "ignored",
            "Time allowed to reach the agent. The guest's progress decides here, see `boot_timeout_s`.",
            unit="ms",
        ),
    ] = 3000
    create_container_timeout: Annotated[
        Positive, key("now", "Time allowed for a request to the agent that can take long.", unit="s")
    ] = 30
    launch_process_timeout: Annotated[
        Count,
        key("ignored", "Limit the agent's own start of helper programs; 0 is the guest's default.", unit="s"),
    ] = 0
    cdh_api_timeout_ms: Annotated[
        Count, key("ignored", "Limit of calls to the confidential data hub inside the guest.", unit="ms")
    ] = 50000
    log_level: Annotated[LogLevel, key("now", "Least severe agent message that is forwarded.")] = "info"
    visible_cdi_devices: Annotated[
        bool, key("warned", "The agent shows container device (CDI) annotations.")
    ] = False
    server_port: Annotated[VsockPort, key("now", "vsock port on which the agent answers.")] = 1024
    log_port: Annotated[VsockPort, key("now", "vsock port of the agent's log stream.")] = 1025
    passfd_listener_port: Annotated[VsockPort, key("ignored", "vsock port for passing standard I/O.")] = 1027
    health_check_request_timeout_ms: Annotated[
        Count, key("ignored", "Time allowed for a health check.", unit="ms")
    ] = 90000
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

"""`[runtime]` and the top-level `[factory]`: what concerns the shim itself."""

from typing import Annotated, Literal

from config.schema.key import Count, LogLevel, Section, VsockPort, key

_TRACING_ONLY = "of use only with `enable_tracing`"


class SharedMount(Section, frozen=True):
    """`[[runtime.shared_mounts]]`: a directory of one container that another one sees."""

    name: Annotated[str, key("now", "Name of the mount.")] = ""
    src_ctr: Annotated[str, key("now", "Container that owns the directory.")] = ""
    src_path: Annotated[str, key("now", "Absolute path in the owning container.")] = ""
    dst_ctr: Annotated[str, key("now", "Container that sees the directory.")] = ""
    dst_path: Annotated[str, key("now", "Absolute path in the other container.")] = ""


class Runtime(Section, frozen=True):
    """`[runtime]`."""

    enable_debug: Annotated[
        bool, key("now", "The shim logs at debug level. Raises `log_level` from info to debug.")
    ] = False
    internetworking_model: Annotated[
        Literal["tcfilter", "macvtap", "none"],
        key(
            "now",
            "How the guest's network devices join the interfaces of the pod's network namespace: by traffic control "
            "(`tcfilter`), by a `macvtap` on each, which bridges' ports and macvlans cannot have, or not at all "
            "(`none`).",
            hint="use tcfilter, which joins interfaces of every kind",
        ),
    ] = "tcfilter"
    name: Annotated[
        Literal["virt_container"],
        key("now", "Kind of sandbox. kata-py runs containers in virtual machines and nothing else."),
    ] = "virt_container"
    hypervisor_name: Annotated[
        Literal["qemu"],
        key(
            "now",
            "Which `[hypervisor.*]` section is read. The others may exist and are not looked at.",
            hint="kata-py runs QEMU only",
        ),
    ] = "qemu"
    agent_name: Annotated[
        Literal["kata"],
        key("now", "Which `[agent.*]` section is read.", hint="kata-py speaks Kata's agent protocol only"),
    ] = "kata"
    disable_guest_seccomp: Annotated[
        bool, key("now", "Do not hand containers' seccomp profiles to the guest.")
    ] = False
    enable_vcpus_pinning: Annotated[
        bool,
        key(
            "now",
            "Keep each vCPU's thread on one of the host's CPUs, as long as there are as many vCPUs as CPUs in the "
            "cpusets of the pod's containers. Else they run where the host's scheduler puts them.",
        ),
    ] = False
    enable_tracing: Annotated[
        bool,
        key(
            "warned",
            "Send trace spans of the shim to a collector.",
            why="the shim records no spans; `timings.json` in the sandbox's directory below `/run/kata-py` has "
            "the times of its start",
        ),
    ] = False
    jaeger_endpoint: Annotated[str, key("ignored", "Address of the trace collector.", why=_TRACING_ONLY)] = ""
    jaeger_user: Annotated[str, key("ignored", "User name for the trace collector.", why=_TRACING_ONLY)] = ""
    jaeger_password: Annotated[
        str, key("ignored", "Password for the trace collector.", why=_TRACING_ONLY)
    ] = ""
    disable_new_netns: Annotated[
        bool,
        key(
            "now",
            "Make no network namespace for a sandbox that was given none: its machine runs in the host's.",
        ),
    ] = False
    sandbox_cgroup_only: Annotated[
        bool,
        key(
            "now",
            "Keep every host process of a sandbox in the pod's control group, from the moment on that its guest is "
            "up: the limits that a kubelet sets for the pod, its overhead included, are then for QEMU as well. Else "
            "only the machine's vCPUs are there, and the rest is in the group `kata_overhead` without limits; see "
            "docs/kubernetes.md.",
        ),
    ] = False
    static_sandbox_resource_mgmt: Annotated[
        bool,
        key(
            "now",
            "Size the machine once, at boot, by the limits of its pod, or of a container without a pod. A pod "
            "without a limit gets `default_vcpus` or `default_memory`.",
        ),
    ] = False
    sandbox_bind_mounts: Annotated[
        tuple[str, ...],
        key(
            "now",
            "Host paths, as `path` or `path:ro` for reading and `path:rw`, that every guest finds in "
            "`/run/kata-containers/shared/containers/passthrough/sandbox-mounts`, by the last part of their "
            "names. Needs `shared_fs`.",
        ),
    ] = ()
    vfio_mode: Annotated[
        Literal["guest-kernel", "vfio"],
        key(
            "now",
            "Who drives the host's devices in a guest: its kernel, so that containers find what its drivers make of"
            " them, or programs of the containers by `/dev/vfio`, which needs `enable_iommu`.",
        ),
    ] = "guest-kernel"
    emptydir_mode: Annotated[
        Literal["shared-fs", "block-encrypted", "block-plain"],
        key(
            "now",
            "Where `emptyDir` volumes of the default medium live: in directories of the host (`shared-fs`), or on "
            "disks of the guest, whose images are in these directories, as they are (`block-plain`) or encrypted with "
            "a key that only the guest has (`block-encrypted`); see docs/disks.md. Volumes in memory are no concern "
            "of it.",
        ),
    ] = "shared-fs"
    experimental: Annotated[
        tuple[str, ...],
        key(
            "refused", "Experimental features, by name.", why="there are no such features", hint="remove them"
        ),
    ] = ()
    enable_pprof: Annotated[
        bool,
        key(
            "warned",
            "Offer a profile of the shim.",
            why="the shim offers none; a sampling profiler can look into its process",
        ),
    ] = False
    dan_conf: Annotated[
        str,
        key(
            "now",
            "Directory with descriptions of networks, `<sandbox id>.json`. A sandbox that has one gets the interfaces "
            "in it, and not those of its network namespace; see docs/kubernetes.md.",
        ),
    ] = ""
    guest_selinux_label: Annotated[
        str,
        key(
            "refused",
            "SELinux label of containers inside the guest.",
            why="containers would run without the label",
        ),
    ] = ""
    disable_guest_empty_dir: Annotated[
        bool,
        key(
            "ignored",
            "Keep `emptyDir` volumes on the host, and not in the guest.",
            why="they are kept on the host with either value",
        ),
    ] = False
    pod_resource_api_sock: Annotated[
        str,
        key(
            "now",
            "The kubelet's pod-resources socket, asked for the devices that a pod was given, so that its machine starts"
            " with them. Needs `cold_plug_vfio`.",
        ),
    ] = ""
    log_level: Annotated[
        LogLevel,
        key(
            "now",
            "Least severe message that the shim logs, unless containerd runs it with debugging: that logs "
            "everything.",
        ),
    ] = "info"
    keep_abnormal: Annotated[
        bool,
        key(
            "now",
            "Keep a machine that takes no notice of a SIGKILL and of a health check, for somebody to look at "
            "it. Else it is ended.",
        ),
    ] = False
    proxy_host_sockets: Annotated[
        bool,
        key(
            "now",
            "Let containers connect to Unix sockets of the host that they mount, or that are in a directory they mount "
            "when they are created. Who listens there sees root of the host connect, and not a container: whoever may "
            "mount such a socket may do whatever it offers. A key of kata-py's own.",
        ),
    ] = False
    use_passfd_io: Annotated[
        bool,
        key(
            "ignored",
            "Pass standard I/O over sockets that QEMU does not offer.",
            why="of other hypervisors, whose vsock is a Unix socket",
        ),
    ] = False
    passfd_listener_port: Annotated[
        VsockPort,
        key(
            "ignored",
            "vsock port used with `use_passfd_io`.",
            why="of other hypervisors, whose vsock is a Unix socket",
        ),
    ] = 1027
    shared_mounts: Annotated[
        tuple[SharedMount, ...],
        key(
            "now",
            "Directories shared between containers of one sandbox. The agent is asked for them; kata-py's own"
            " refuses such a container.",
        ),
    ] = ()


class Factory(Section, frozen=True):
    """Top-level `[factory]`: start machines from prepared ones."""

    enable_template: Annotated[
        bool, key("refused", "Start machines from a saved template.", why="every sandbox boots its own guest")
    ] = False
    template_path: Annotated[
        str, key("ignored", "Directory of the template.", why="every sandbox boots its own guest")
    ] = "/run/vc/vm/template"
    vm_cache_number: Annotated[
        Count,
        key("warned", "Machines that are kept ready; 0 is none.", why="every sandbox boots its own guest"),
    ] = 0
    vm_cache_endpoint: Annotated[
        str,
        key(
            "ignored",
            "Socket of the program that keeps machines ready.",
            why="every sandbox boots its own guest",
        ),
    ] = "/var/run/kata-containers/cache.sock"

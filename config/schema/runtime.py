"""`[runtime]` and the top-level `[factory]`: what concerns the shim itself."""

from typing import Annotated, Literal

from config.schema.key import Count, LogLevel, Section, VsockPort, key


class SharedMount(Section, frozen=True):
    """`[[runtime.shared_mounts]]`: a directory of one container that another one sees."""

    name: Annotated[str, key("ignored", "Name of the mount.")] = ""
    src_ctr: Annotated[str, key("ignored", "Container that owns the directory.")] = ""
    src_path: Annotated[str, key("ignored", "Absolute path in the owning container.")] = ""
    dst_ctr: Annotated[str, key("ignored", "Container that sees the directory.")] = ""
    dst_path: Annotated[str, key("ignored", "Absolute path in the other container.")] = ""


class Runtime(Section, frozen=True):
    """`[runtime]`."""

    enable_debug: Annotated[
        bool, key("now", "The shim logs at debug level. Raises `log_level` from info to debug.")
    ] = False
    internetworking_model: Annotated[
        Literal["tcfilter", "none", "macvtap", "l3forwarding"],
        key("warned", "How the guest's network card joins the pod's network namespace."),
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
        bool, key("warned", "Pin each vCPU thread to one CPU of the pod's set.")
    ] = False
    enable_tracing: Annotated[bool, key("warned", "Send trace spans of the shim to a collector.")] = False
    jaeger_endpoint: Annotated[str, key("ignored", "Address of the trace collector.")] = ""
    jaeger_user: Annotated[str, key("ignored", "User name for the trace collector.")] = ""
    jaeger_password: Annotated[str, key("ignored", "Password for the trace collector.")] = ""
    disable_new_netns: Annotated[bool, key("warned", "Run the machine in the host's network namespace.")] = (
        False
    )
    sandbox_cgroup_only: Annotated[
        bool, key("warned", "Keep every host process of a sandbox in the pod's control group.")
    ] = False
    static_sandbox_resource_mgmt: Annotated[
        bool, key("warned", "Size the machine once, at boot, from the pod's resource annotations.")
    ] = False
    sandbox_bind_mounts: Annotated[
        tuple[str, ...],
        key("warned", "Host paths, as `path`, `path:ro` or `path:rw`, that every guest can read."),
    ] = ()
    vfio_mode: Annotated[
        Literal["guest-kernel", "vfio"],
        key("warned", "What containers see of devices that were passed through."),
    ] = "guest-kernel"
    emptydir_mode: Annotated[
        Literal["shared-fs", "block-encrypted", "block-plain"],
        key(
            "refused",
            "Where disk-backed `emptyDir` volumes live.",
            why="volumes would be plain host directories",
        ),
    ] = "shared-fs"
    experimental: Annotated[tuple[str, ...], key("warned", "Experimental features, by name.")] = ()
    enable_pprof: Annotated[bool, key("ignored", "Profiling endpoint of another runtime.")] = False
    dan_conf: Annotated[
        str, key("warned", "Directory with one network description per sandbox, `<sandbox id>.json`.")
    ] = ""
    guest_selinux_label: Annotated[str, key("warned", "SELinux label of containers inside the guest.")] = ""
    disable_guest_empty_dir: Annotated[
        bool, key("warned", "Keep memory-backed `emptyDir` volumes on the host.")
    ] = False
    pod_resource_api_sock: Annotated[
        str, key("warned", "The kubelet's pod-resources socket, asked which devices a pod was given.")
    ] = ""
    log_level: Annotated[LogLevel, key("now", "Least severe message that the shim logs.")] = "info"
    keep_abnormal: Annotated[
        bool, key("ignored", "Keep the shim running when the agent stops answering.")
    ] = False
    use_passfd_io: Annotated[
        bool, key("ignored", "Pass standard I/O over sockets that QEMU does not offer.")
    ] = False
    passfd_listener_port: Annotated[VsockPort, key("ignored", "vsock port used with `use_passfd_io`.")] = 1027
    shared_mounts: Annotated[
        tuple[SharedMount, ...], key("warned", "Directories shared between containers of one sandbox.")
    ] = ()


class Factory(Section, frozen=True):
    """Top-level `[factory]`: start machines from prepared ones."""

    enable_template: Annotated[
        bool, key("refused", "Start machines from a saved template.", why="every sandbox boots its own guest")
    ] = False
    template_path: Annotated[str, key("ignored", "Directory of the template.")] = "/run/vc/vm/template"
    vm_cache_number: Annotated[Count, key("warned", "Machines that are kept ready; 0 is none.")] = 0
    vm_cache_endpoint: Annotated[str, key("ignored", "Socket of the program that keeps machines ready.")] = (
        "/var/run/kata-containers/cache.sock"
    )

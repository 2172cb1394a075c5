"""`[hypervisor.qemu]`: the virtual machine. One class, because it is one section; ordered by topic."""

from typing import Annotated, Literal

from config.schema.key import Count, Fraction, LogLevel, Positive, Section, Wide, key

SectorSize = Literal[0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
BlockDriver = Literal["virtio-blk-pci", "virtio-blk-ccw", "virtio-scsi", "virtio-pmem"]

DEFAULT_QEMU = "/usr/bin/qemu-system-x86_64"
DEFAULT_KERNEL = "/usr/share/kata-py/vmlinux"
DEFAULT_INITRD = "/usr/share/kata-py/initrd.img"

_NO_CONFIDENTIAL = "guest memory would not be protected"
_NO_TEMPLATE = "every sandbox boots its own guest"


class QemuFactory(Section, frozen=True):
    """`[hypervisor.qemu.factory]`."""

    enable_template: Annotated[
        bool, key("refused", "Start machines from a saved template.", why=_NO_TEMPLATE)
    ] = False
    template_path: Annotated[str, key("ignored", "Directory of the template.")] = "/run/vc/vm/template"


class GuestExtensionImage(Section, frozen=True):
    """`[[hypervisor.qemu.guest_extension_images]]`: a read-only disk with more programs for the guest."""

    name: Annotated[str, key("ignored", "Name; letters, digits, `_` and `-`.")]
    path: Annotated[str, key("ignored", "Disk image; an entry without one is dropped.")] = ""
    verity_params: Annotated[str, key("ignored", "dm-verity parameters of the image.")] = ""


class RootlessUser(Section, frozen=True):
    """`[hypervisor.qemu.rootless_user]`: Kata's runtime keeps its choice here; files have no need of it."""

    uid: Annotated[Count, key("ignored", "Chosen user id.")] = 0
    gid: Annotated[Count, key("ignored", "Chosen group id.")] = 0
    groups: Annotated[tuple[Count, ...], key("ignored", "Further group ids.")] = ()
    user_name: Annotated[str, key("ignored", "Chosen user name.")] = ""


class Qemu(Section, frozen=True):
    """`[hypervisor.qemu]`."""

    # Programs and files
    path: Annotated[
        str, key("now", "The QEMU program.", hint="install QEMU or name its system emulator here")
    ] = DEFAULT_QEMU
    kernel: Annotated[
        str,
        key(
            "now",
            "Guest kernel.",
            hint="build the guest with: kata-py guest build",
        ),
    ] = DEFAULT_KERNEL
    initrd: Annotated[
        str,
        key(
            "now",
            f"Guest initial RAM disk. Empty, with `image` empty too, means `{DEFAULT_INITRD}`.",
            hint="build the guest with: kata-py guest build",
        ),
    ] = ""
    image: Annotated[
        str,
        key(
            "now",
            "Disk image whose first partition is the guest's root file system, instead of `initrd`. Attached "
            "read-only as a virtio disk; the kernel needs the drivers for it built in.",
            hint="name a file that exists, or set initrd instead",
        ),
    ] = ""
    firmware: Annotated[
        str, key("now", "Guest firmware; empty is QEMU's own.", hint='use "" for QEMU\'s own firmware')
    ] = ""
    firmware_volume: Annotated[
        str,
        key("refused", "Variable store of the guest firmware.", why="the firmware could not keep variables"),
    ] = ""
    pflashes: Annotated[
        tuple[str, ...],
        key("refused", "Flash images with the guest firmware.", why="the guest would boot other firmware"),
    ] = ()
    rootfs_type: Annotated[Literal["ext4", "xfs", "erofs"], key("now", "File system inside `image`.")] = (
        "ext4"
    )
    vm_rootfs_driver: Annotated[
        Literal["virtio-pmem", "virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-mmio", "virtio-scsi"],
        key("ignored", "How `image` is attached. This version always uses a virtio disk."),
    ] = "virtio-blk-pci"
    disable_image_nvdimm: Annotated[bool, key("ignored", "Do not attach `image` as persistent memory.")] = (
        False
    )
    kernel_verity_params: Annotated[
        str,
        key(
            "refused",
            "dm-verity parameters that `image` is checked with.",
            why="the guest's files would not be checked",
        ),
    ] = ""
    guest_extension_images: Annotated[
        tuple[GuestExtensionImage, ...],
        key("refused", "Further disk images for the guest.", why="the guest would lack what they hold"),
    ] = ()
    initdata: Annotated[
        str, key("refused", "Initial data that the guest measures at boot.", why="nothing would be measured")
    ] = ""

    # Machine and processors
    machine_type: Annotated[
        Literal["q35"],
        key("now", "QEMU machine.", hint="other machine types are not supported in this version"),
    ] = "q35"
    machine_accelerators: Annotated[
        str, key("now", "Further properties of the machine, separated by commas: `kernel_irqchip=split`.")
    ] = ""
    cpu_features: Annotated[
        str, key("now", "Features added to the CPU model, separated by commas: `pmu=off`.")
    ] = ""
    kernel_params: Annotated[
        str, key("now", "Words added to the guest kernel's command line, separated by spaces.")
    ] = ""
    default_vcpus: Annotated[
        float,
        key(
            "now",
            "vCPUs at boot. 0 is 1; negative, or more than the host has, is all of the host's; never more "
            "than `default_maxvcpus`. QEMU gets a fraction rounded up.",
        ),
    ] = 1.0
    overhead_vcpus: Annotated[
        Fraction, key("ignored", "vCPUs added for the guest itself under static sizing.")
    ] = 0.0
    default_maxvcpus: Annotated[
        Count,
        key(
            "now",
            "Most vCPUs that the machine can have. 0, or more than the host has, is all of the host's.",
            hint="256 is the most that the machine supports",
        ),
    ] = 0
    default_memory: Annotated[
        Count,
        key(
            "now",
            "Memory at boot. 0 is 128; more than the host has is all of the host's; at least 64.",
            unit="MiB",
        ),
    ] = 2048
    overhead_memory: Annotated[
        Count, key("ignored", "Memory added for the guest itself under static sizing.", unit="MiB")
    ] = 0
    memory_slots: Annotated[int, key("ignored", "Slots for adding memory later. 0 is 128.", ge=0, le=256)] = (
        128
    )
    default_maxmemory: Annotated[
        Count,
        key(
            "ignored",
            "Most memory that the machine can have. 0, or more than the host has, is all of the host's. Not "
            "less than `default_memory`.",
            unit="MiB",
        ),
    ] = 0
    memory_offset: Annotated[
        Count, key("ignored", "Address space kept free for persistent memory.", unit="MiB")
    ] = 0
    enable_virtio_mem: Annotated[bool, key("warned", "Add and take memory through virtio-mem.")] = False
    enable_mem_prealloc: Annotated[bool, key("warned", "Take all guest memory from the host at start.")] = (
        False
    )
    enable_hugepages: Annotated[
        bool,
        key(
            "refused", "Back guest memory with huge pages.", why="memory would be accounted as ordinary pages"
        ),
    ] = False
    hugepage_type: Annotated[Literal["hugetlbfs", "thp"], key("ignored", "Kind of huge pages.")] = "hugetlbfs"
    file_mem_backend: Annotated[str, key("warned", "Directory for files that back guest memory.")] = ""
    reclaim_guest_freed_memory: Annotated[
        bool, key("warned", "Give memory that the guest has freed back to the host.")
    ] = False

    # Files shared with the guest
    shared_fs: Annotated[
        Literal["virtio-fs", "none"],
        key(
            "now",
            "How the host's files reach the guest; `none` shares nothing.",
            hint="other ways of sharing are not supported in this version",
        ),
    ] = "virtio-fs"
    virtio_fs_daemon: Annotated[
        str,
        key(
            "now",
            "The virtiofsd program. Empty looks at `/usr/libexec/virtiofsd`, then `/usr/lib/qemu/virtiofsd`.",
            hint='install virtiofsd, or use "" to search the usual places',
        ),
    ] = ""
    virtio_fs_cache: Annotated[
        Literal["never", "auto", "always", "none"],
        key(
            "now", "How long the guest may trust what it has read before. `none` is the old name of `never`."
        ),
    ] = "never"
    virtio_fs_queue_size: Annotated[
        int, key("now", "Queue size of the device, a power of two. 0 is 1024.", ge=0, le=1024)
    ] = 0
    virtio_fs_extra_args: Annotated[tuple[str, ...], key("now", "Further arguments of virtiofsd.")] = ()
    virtio_fs_cache_size: Annotated[
        Count, key("warned", "Size of the window for direct access (DAX); 0 is none.", unit="MiB")
    ] = 0
    virtio_fs_is_dax: Annotated[bool, key("warned", "Direct access (DAX) to shared files.")] = False
    prefetch_list_path: Annotated[str, key("ignored", "File list of an image service that is not used.")] = ""
    msize_9p: Annotated[
        Positive, key("ignored", "Packet size of 9p, which is not offered.", unit="bytes")
    ] = 8192

    # Block devices
    disable_block_device_use: Annotated[
        bool, key("ignored", "Never pass host block devices to the guest. This version never does.")
    ] = True
    block_device_driver: Annotated[BlockDriver, key("ignored", "Bus of block devices added later.")] = (
        "virtio-blk-pci"
    )
    block_device_aio: Annotated[Literal["io_uring", "native", "threads"], key("ignored", "I/O engine.")] = (
        "io_uring"
    )
    block_device_cache_set: Annotated[bool, key("ignored", "Apply the two cache keys below.")] = False
    block_device_cache_direct: Annotated[bool, key("ignored", "Go past the host's page cache.")] = False
    block_device_cache_noflush: Annotated[bool, key("ignored", "Ignore flushes of the guest.")] = False
    block_device_logical_sector_size: Annotated[
        SectorSize, key("ignored", "Logical sector size; 0 is QEMU's default.", unit="bytes")
    ] = 0
    block_device_physical_sector_size: Annotated[
        SectorSize, key("ignored", "Physical sector size; 0 is QEMU's default.", unit="bytes")
    ] = 0
    enable_iothreads: Annotated[bool, key("ignored", "A thread of its own for block I/O.")] = False
    indep_iothreads: Annotated[Count, key("ignored", "Number of independent I/O threads.")] = 0
    queue_size: Annotated[Count, key("ignored", "Queue depth of block devices.")] = 128
    num_queues: Annotated[Count, key("ignored", "Queues of each block device.")] = 1
    disk_rate_limiter_bw_max_rate: Annotated[
        Wide, key("warned", "Disk bandwidth; 0 is no limit.", unit="bit/s")
    ] = 0
    disk_rate_limiter_bw_one_time_burst: Annotated[
        Wide | None, key("ignored", "Bandwidth credit at start.")
    ] = None
    disk_rate_limiter_ops_max_rate: Annotated[
        Wide, key("warned", "Disk operations per second; 0 is no limit.")
    ] = 0
    disk_rate_limiter_ops_one_time_burst: Annotated[
        Wide | None, key("ignored", "Operations credit at start.")
    ] = None
    enable_vhost_user_store: Annotated[
        bool, key("warned", "Storage devices served by other host programs.")
    ] = False
    vhost_user_store_path: Annotated[str, key("ignored", "Directory of those programs' sockets.")] = (
        "/var/run/vhost-user"
    )
    vhost_user_reconnect_timeout_sec: Annotated[
        Count, key("ignored", "Pause before reconnecting to them; 0 is never.", unit="s")
    ] = 0

    # Buses, devices and networks
    default_bridges: Annotated[Count, key("ignored", "PCI bridges for devices added later.")] = 1
    pcie_root_port: Annotated[Count, key("warned", "Spare PCIe root ports.")] = 0
    pcie_switch_port: Annotated[Count, key("warned", "Spare PCIe switch ports.")] = 0
    cold_plug_vfio: Annotated[
        Literal["no-port", "root-port", "switch-port", "bridge-port"],
        key("warned", "Port for host devices given to the machine at boot."),
    ] = "no-port"
    hot_plug_vfio: Annotated[
        Literal["no-port", "root-port", "switch-port", "bridge-port"],
        key("warned", "Port for host devices given to a running machine."),
    ] = "no-port"
    hotplug_vfio_on_root_bus: Annotated[bool, key("warned", "Put such devices on the root bus.")] = False
    enable_iommu: Annotated[bool, key("warned", "Give the guest a virtual IOMMU.")] = False
    enable_iommu_platform: Annotated[bool, key("warned", "Devices use the platform's IOMMU (s390x).")] = False
    disable_vhost_net: Annotated[
        bool, key("warned", "Handle network packets in QEMU, not in the host's kernel.")
    ] = False
    network_queues: Annotated[Count, key("warned", "Queue pairs of each network device.")] = 1
    rx_rate_limiter_max_rate: Annotated[
        Wide, key("warned", "Limit of what the guest receives; 0 is none.", unit="bit/s")
    ] = 0
    tx_rate_limiter_max_rate: Annotated[
        Wide, key("warned", "Limit of what the guest sends; 0 is none.", unit="bit/s")
    ] = 0
    entropy_source: Annotated[
        str,
        key(
            "ignored",
            "Host file for the guest's random number device. The guest uses its processor's instead.",
        ),
    ] = "/dev/urandom"
    use_legacy_serial: Annotated[
        bool, key("ignored", "Console on the first serial port. This version always uses it.")
    ] = False
    guest_hook_path: Annotated[str, key("warned", "Directory in the guest with OCI hooks.")] = ""

    # Isolation of the QEMU process, confidential guests
    seccomp_sandbox: Annotated[
        str,
        key(
            "now",
            "QEMU's own system call filter: `on`, then any of `,obsolete=deny`, `,elevateprivileges=deny`, "
            "`,spawn=deny`, `,resourcecontrol=deny`. Empty is no filter.",
            hint='for example "on,obsolete=deny,spawn=deny"',
        ),
    ] = ""
    seccompsandbox: Annotated[
        str, key("now", "Older name of `seccomp_sandbox`; used when that one is empty.")
    ] = ""
    disable_seccomp: Annotated[bool, key("ignored", "Turns a filter off that QEMU does not have.")] = False
    rootless: Annotated[
        bool, key("refused", "Run QEMU as a user of its own.", why="QEMU would run as the shim's user")
    ] = False
    rootless_user: RootlessUser = RootlessUser()
    disable_selinux: Annotated[
        bool, key("ignored", "Do not label the QEMU process. This version never does.")
    ] = False
    selinux_label: Annotated[
        str, key("refused", "SELinux label of the QEMU process.", why="QEMU would run without that label")
    ] = ""
    disable_guest_selinux: Annotated[bool, key("warned", "Do not label containers inside the guest.")] = True
    disable_nesting_checks: Annotated[
        bool, key("ignored", "Do not look whether the host is a guest itself.")
    ] = False
    disable_nested_virtualization: Annotated[
        bool, key("warned", "Hide virtualization features from the guest.")
    ] = False
    jailer_path: Annotated[
        str, key("refused", "Program that confines the VMM.", why="QEMU has no jailer")
    ] = ""
    valid_jailer_paths: Annotated[
        tuple[str, ...], key("refused", "Jailers that a pod may ask for.", why="QEMU has no jailer")
    ] = ()
    confidential_guest: Annotated[
        bool, key("refused", "Hide guest memory from the host (TDX, SEV, SE).", why=_NO_CONFIDENTIAL)
    ] = False
    sev_snp_guest: Annotated[bool, key("refused", "Prefer SEV-SNP.", why=_NO_CONFIDENTIAL)] = False
    snp_id_block: Annotated[
        str, key("refused", "SEV-SNP identity block, base64 of 96 bytes.", why=_NO_CONFIDENTIAL)
    ] = ""
    snp_id_auth: Annotated[
        str, key("refused", "SEV-SNP identity signatures, base64 of 4096 bytes.", why=_NO_CONFIDENTIAL)
    ] = ""
    snp_guest_policy: Annotated[
        Count, key("warned", "SEV-SNP policy bits; the default allows hyper-threading.")
    ] = 0x30000
    tdx_quote_generation_service_socket_port: Annotated[
        Count, key("ignored", "vsock port of the TDX quote service.")
    ] = 4050

    # What pods may change
    enable_annotations: Annotated[
        tuple[str, ...],
        key("warned", "Regular expressions of the hypervisor keys that pods may set by annotation."),
    ] = ()
    valid_hypervisor_paths: Annotated[tuple[str, ...], key("ignored", "Patterns for `path` from a pod.")] = ()
    valid_virtio_fs_daemon_paths: Annotated[
        tuple[str, ...], key("ignored", "Patterns for `virtio_fs_daemon` from a pod.")
    ] = ()
    valid_vhost_user_store_paths: Annotated[
        tuple[str, ...], key("ignored", "Patterns for `vhost_user_store_path` from a pod.")
    ] = ()
    valid_entropy_sources: Annotated[
        tuple[str, ...], key("ignored", "Patterns for `entropy_source` from a pod.")
    ] = ()
    valid_file_mem_backends: Annotated[
        tuple[str, ...], key("ignored", "Patterns for `file_mem_backend` from a pod.")
    ] = ()
    valid_ctlpaths: Annotated[tuple[str, ...], key("ignored", "Patterns for `ctlpath`.")] = ()

    # Debugging
    enable_debug: Annotated[
        bool, key("now", "Log QEMU and the guest console. Raises `log_level` from info to debug.")
    ] = False
    log_level: Annotated[LogLevel, key("now", "Least severe message about the machine that is logged.")] = (
        "info"
    )
    extra_monitor_socket: Annotated[
        Literal["", "hmp", "qmp", "qmp-pretty"], key("warned", "A second QEMU monitor for people.")
    ] = ""
    guest_memory_dump_path: Annotated[
        str, key("warned", "Directory for guest memory after a guest panic.")
    ] = ""
    guest_memory_dump_paging: Annotated[bool, key("ignored", "Use guest addresses in that dump.")] = False

    # Accepted for the sake of existing files: other hypervisors, internals of Kata's runtime
    ctlpath: Annotated[str, key("ignored", "Control program of other hypervisors.")] = ""
    enable_guest_swap: Annotated[
        bool, key("refused", "Swap inside the guest.", why="memory would end earlier than planned")
    ] = False
    guest_swap_path: Annotated[str, key("ignored", "Directory of swap files.")] = "/run/kata-containers/swap"
    guest_swap_size_percent: Annotated[Count, key("ignored", "Swap in relation to memory.", unit="%")] = 100
    guest_swap_create_threshold_secs: Annotated[
        Count, key("ignored", "Pause before swap is made.", unit="s")
    ] = 60
    hypervisor_socket: Annotated[str, key("ignored", "Remote hypervisors only.")] = ""
    hypervisor_timeout: Annotated[Count, key("ignored", "Remote hypervisors only.", unit="s")] = 0
    default_gpus: Annotated[Count, key("ignored", "Remote hypervisors only.")] = 0
    default_gpu_model: Annotated[str, key("ignored", "Remote hypervisors only.")] = ""
    boot_to_be_template: Annotated[
        bool, key("refused", "This machine becomes a template.", why=_NO_TEMPLATE)
    ] = False
    boot_from_template: Annotated[
        bool, key("refused", "This machine starts from a template.", why=_NO_TEMPLATE)
    ] = False
    memory_path: Annotated[str, key("ignored", "Memory file of a template.")] = ""
    device_state_path: Annotated[str, key("ignored", "Device state of a template.")] = ""
    factory: QemuFactory = QemuFactory()

    # Ours
    accel: Annotated[
        Literal["auto", "kvm", "tcg"],
        key(
            "now",
            "Who runs the guest's instructions. `auto` takes KVM where it can run a guest, else QEMU's own "
            "translator (`tcg`), which is slower and needs no hardware. A key of kata-py's own.",
        ),
    ] = "auto"
    vsock: Annotated[
        Literal["auto", "vhost", "user"],
        key(
            "now",
            "Who carries the guest's sockets: the host's kernel (`vhost`) or the shim (`user`). `auto` takes "
            "the kernel where it can. A key of kata-py's own.",
        ),
    ] = "auto"
    qmp_read_timeout_ms: Annotated[
        Positive,
        key(
            "now",
            "Time allowed for each answer while the QEMU monitor is being reached. A key of kata-py's own.",
            unit="ms",
        ),
    ] = 250
    qmp_connect_timeout_ms: Annotated[
        Positive,
        key(
            "now",
            "Time allowed to reach the QEMU monitor, all attempts together. A key of kata-py's own.",
            unit="ms",
        ),
    ] = 5000
    qmp_retry_pause_ms: Annotated[
        Positive, key("now", "Pause between two attempts. A key of kata-py's own.", unit="ms")
    ] = 50
    boot_timeout_s: Annotated[
        Positive,
        key(
            "now",
            "Give up on a guest that has made no progress, on its console or its channels, for this long. A "
            "slow guest that keeps going is not stopped. A key of kata-py's own.",
            unit="s",
        ),
    ] = 60

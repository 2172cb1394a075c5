"""`[hypervisor.qemu]`: the virtual machine. One class, because it is one section; ordered by topic."""

from typing import Annotated, Literal

from config.schema.key import U32_MAX, Count, Fraction, LogLevel, Positive, Section, Wide, key

SectorSize = Literal[0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
BlockDriver = Literal["virtio-blk-pci", "virtio-blk-ccw", "virtio-scsi", "virtio-pmem"]

DEFAULT_QEMU = "/usr/bin/qemu-system-x86_64"
# By machine type, which decides the guests' architecture.
DEFAULT_QEMUS = {
    "q35": DEFAULT_QEMU,
    "virt": "/usr/bin/qemu-system-aarch64",
    "s390-ccw-virtio": "/usr/bin/qemu-system-s390x",
}
# Its confidential guests have their root file system inside the kernel's file.
SEALED_MACHINE = "s390-ccw-virtio"
FIRMWARE_HINT = "name OVMF made for TDX (OVMF.inteltdx.fd) or SEV-SNP (AMDSEV.fd)"
# Debian's name of that, which containerd has too, and Debian's package of its emulator.
ARCHITECTURES = {"q35": "amd64", "virt": "arm64", "s390-ccw-virtio": "s390x"}
QEMU_PACKAGES = {"q35": "qemu-system-x86", "virt": "qemu-system-arm", "s390-ccw-virtio": "qemu-system-s390x"}
DEFAULT_GUESTS = "/usr/share/kata-py"
DEFAULT_KERNEL = f"{DEFAULT_GUESTS}/vmlinux"
DEFAULT_INITRD = f"{DEFAULT_GUESTS}/initrd.img"

_NO_TEMPLATE = "every sandbox boots its own guest"
_TEMPLATE_ONLY = "of templates, and every sandbox boots its own guest"
_SWAP_ONLY = "containers say by annotations how much they want, and get it with their creation"
_REMOTE_ONLY = "of hypervisors on other machines"
_EACH = "each network interface of the guest"
_NO_DISK_LIMIT = "disks have no limits"


class QemuFactory(Section, frozen=True):
    """`[hypervisor.qemu.factory]`."""

    enable_template: Annotated[
        bool, key("refused", "Start machines from a saved template.", why=_NO_TEMPLATE)
    ] = False
    template_path: Annotated[str, key("ignored", "Directory of the template.", why=_TEMPLATE_ONLY)] = (
        "/run/vc/vm/template"
    )


class GuestExtensionImage(Section, frozen=True):
    """`[[hypervisor.qemu.guest_extension_images]]`: a read-only disk with more programs for the guest."""

    name: Annotated[
        str,
        key(
            "now",
            "Name, of at most 10 letters, digits, `_` and `-`; the guest knows the disk by the serial number "
            "`extension-NAME`.",
        ),
    ]
    path: Annotated[
        str,
        key(
            "now",
            "Disk image, attached read-only as a virtio disk; an entry without one is dropped.",
        ),
    ] = ""
    verity_params: Annotated[
        str,
        key(
            "now",
            "dm-verity parameters, as in `kernel_verity_params`; the guest reads them as "
            "`kata.extension.NAME.verity_params` on its kernel's command line.",
        ),
    ] = ""


class RootlessUser(Section, frozen=True):
    """`[hypervisor.qemu.rootless_user]`: Kata's runtime keeps its choice here; files have no need of it."""

    uid: Annotated[
        Count, key("ignored", "Chosen user id.", why="the user is chosen anew for every sandbox")
    ] = 0
    gid: Annotated[
        Count, key("ignored", "Chosen group id.", why="the user is chosen anew for every sandbox")
    ] = 0
    groups: Annotated[
        tuple[Count, ...],
        key("ignored", "Further group ids.", why="the user is chosen anew for every sandbox"),
    ] = ()
    user_name: Annotated[
        str, key("ignored", "Chosen user name.", why="the user is chosen anew for every sandbox")
    ] = ""


class Qemu(Section, frozen=True):
    """`[hypervisor.qemu]`."""

    # Programs and files
    path: Annotated[
        str,
        key(
            "now",
            "The QEMU program. The default one, and an empty name, are those of the machine's architecture.",
            hint="install QEMU or name its system emulator here",
        ),
    ] = DEFAULT_QEMU
    kernel: Annotated[
        str,
        key(
            "now",
            "Guest kernel. The default one is that of the host's architecture; for another see `guest_dir`.",
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
            "read-only as `vm_rootfs_driver` says. The kernel needs the drivers for it, and dm-verity for "
            "`kernel_verity_params`, built in; if it has them as modules, `image_initrd` has to bring them.",
            hint="name a file that exists, or set initrd instead",
        ),
    ] = ""
    image_initrd: Annotated[
        str,
        key(
            "now",
            "Small initial RAM disk that loads the drivers for `image`, mounts it and starts what is in it; "
            "`kata-py guest build --image` makes both. Empty: the kernel does that itself.",
            hint="name the image-initrd.img that was built with the image",
        ),
    ] = ""
    firmware: Annotated[
        str, key("now", "Guest firmware; empty is QEMU's own.", hint='use "" for QEMU\'s own firmware')
    ] = ""
    firmware_volume: Annotated[
        str,
        key(
            "now",
            "Variables of the guest firmware. With it `firmware` is flash memory; what a guest changes is lost.",
            hint="name a file that exists, and the firmware's code as firmware",
        ),
    ] = ""
    pflashes: Annotated[
        tuple[str, ...],
        key(
            "now",
            "Flash memory with the guest firmware, in place of `firmware`: its code, which is read-only, then its "
            "variables, whose changes are lost.",
            hint="name files that exist",
        ),
    ] = ()
    rootfs_type: Annotated[Literal["ext4", "xfs", "erofs"], key("now", "File system inside `image`.")] = (
        "ext4"
    )
    vm_rootfs_driver: Annotated[
        Literal["virtio-pmem", "virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-mmio", "virtio-scsi"],
        key(
            "now",
            "How `image` is attached: `virtio-pmem` as persistent memory, `virtio-blk-...` as a virtio disk on the "
            "machine's own bus. Guests with arm64 find persistent memory only through `firmware`; s390x has none.",
            hint="use virtio-blk-pci, virtio-blk-ccw or virtio-pmem",
        ),
    ] = "virtio-blk-pci"
    disable_image_nvdimm: Annotated[
        bool, key("now", "Attach `image` as a virtio disk where `vm_rootfs_driver` says persistent memory.")
    ] = False
    kernel_verity_params: Annotated[
        str,
        key(
            "now",
            "dm-verity parameters that the kernel checks the first partition of `image` with, by the hashes on the "
            "second: `root_hash=...,salt=...,data_blocks=...,data_block_size=...,hash_block_size=...`.",
        ),
    ] = ""
    guest_extension_images: Annotated[
        tuple[GuestExtensionImage, ...],
        key(
            "now",
            "Further disk images for the guest, with programs that its own image starts. That of kata-py "
            "starts none.",
        ),
    ] = ()
    initdata: Annotated[
        str,
        key(
            "now",
            "Data for the guest's own programs, on a small disk: base64 of gzip of TOML with `version` 0.1.0, "
            "`algorithm` (sha256, sha384, sha512) and a table `data` of strings, at most 256 KiB, and 1 MiB unpacked. "
            "The reports of guests with TDX and SEV-SNP prove their digest.",
            hint="make it with: gzip -c initdata.toml | base64 -w0",
        ),
    ] = ""

    # Machine and processors
    machine_type: Annotated[
        Literal["q35", "virt", "s390-ccw-virtio"],
        key(
            "now",
            "QEMU machine, and with it the guests' architecture: x86_64, arm64, s390x. While nothing sets this key, "
            "the first container's program decides between those with a guest.",
            hint="other machine types are not supported in this version",
        ),
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
        Fraction, key("now", "vCPUs for the guest itself, beside those of the limits.")
    ] = 0.0
    default_maxvcpus: Annotated[
        Count,
        key(
            "now",
            "Most vCPUs that the machine can have. 0, or more than the host has, is all of the host's. Without "
            "`static_sandbox_resource_mgmt` the machine gets as many as the CPU limits of its containers ask for, and "
            "loses those again that it does not need; s390x has only the first half, arm64 with KVM neither. Without "
            "KVM the machine has from the start what its pod's limits, or first container's, ask for, and the guest "
            "uses as many of them as it needs.",
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
        Count,
        key("now", "Memory for the guest itself, beside that of the limits.", unit="MiB"),
    ] = 0
    memory_slots: Annotated[
        int,
        key(
            "now",
            "Slots for memory modules that x86_64 machines get when the memory limits of their containers ask for "
            "more than there is, without `static_sandbox_resource_mgmt`. 0 is 128. Modules stay; a machine with "
            "`enable_virtio_mem`, or with a balloon (`reclaim_guest_freed_memory`), gives memory back.",
            ge=0,
            le=256,
        ),
    ] = 128
    default_maxmemory: Annotated[
        Count,
        key(
            "now",
            "Most memory that the machine can have. 0, or more than the host has, is all of the host's. Not "
            "less than `default_memory`. Without KVM at most 512 GiB.",
            unit="MiB",
        ),
    ] = 0
    memory_offset: Annotated[
        Count,
        key(
            "now",
            "Address space for memory devices beyond `default_maxmemory`.",
            unit="MiB",
        ),
    ] = 0
    enable_virtio_mem: Annotated[
        bool,
        key(
            "now",
            "Add memory, up to `default_maxmemory`, and take it back through a virtio-mem device, instead of adding "
            "modules. It is empty at first. s390x needs QEMU 10.",
            hint="set default_memory to what is needed",
        ),
    ] = False
    enable_mem_prealloc: Annotated[bool, key("now", "Take all guest memory from the host at start.")] = False
    enable_hugepages: Annotated[
        bool,
        key("now", "Back guest memory with huge pages, not together with `file_mem_backend`."),
    ] = False
    hugepage_type: Annotated[
        Literal["hugetlbfs", "thp"],
        key(
            "now",
            "Kind of huge pages: those set aside on the host (`hugetlbfs`), or what the host's kernel gives to shared "
            "memory as `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says (`thp`).",
        ),
    ] = "hugetlbfs"
    file_mem_backend: Annotated[
        str,
        key(
            "now",
            "Directory for files, without names, that are guest memory.",
            hint="name a directory that exists",
        ),
    ] = ""
    enable_numa: Annotated[
        bool,
        key(
            "now",
            "Divide the guest's memory and processors into NUMA nodes, one for each of the host's that has memory, "
            "or as `numa_mapping` says. On a host with one node the guest has none. s390x guests have none.",
        ),
    ] = False
    numa_mapping: Annotated[
        tuple[str, ...],
        key(
            "now",
            "NUMA nodes of the guest, with `enable_numa` or without it: for each the nodes of the host that its memory "
            "comes from, as in `0` or `0,2-3`. Memory and processors are divided evenly.",
            hint='for example ["0", "1"]',
        ),
    ] = ()
    reclaim_guest_freed_memory: Annotated[
        bool,
        key(
            "now",
            "Give memory that the guest has freed back to the host, through a balloon with free page "
            "reporting.",
        ),
    ] = False

    # Files shared with the guest
    shared_fs: Annotated[
        Literal["virtio-fs", "none"],
        key(
            "now",
            "How the host's files reach the guest; `none` shares nothing. With `virtio-fs` guests whose byte order is "
            "not the host's, as those of s390x on x86_64, get 9p, served by QEMU.",
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
        Count,
        key(
            "now",
            "Size of the window through which the guest maps files without copying them (DAX); 0 is none. It takes a "
            "QEMU that has it, which no release does: with any other the machine is refused before it starts.",
            unit="MiB",
            hint="set it to 0; virtio_fs_cache decides what is cached",
        ),
    ] = 0
    virtio_fs_is_dax: Annotated[
        bool,
        key("now", "Such a window, of 1024 MiB unless `virtio_fs_cache_size` says another size."),
    ] = False
    prefetch_list_path: Annotated[
        str,
        key(
            "ignored",
            "File list of an image service that is not used.",
            why="of the Nydus image service, which `shared_fs` does not offer",
        ),
    ] = ""
    msize_9p: Annotated[
        Positive,
        key(
            "now",
            "Packet size of 9p, which takes the place of virtiofs in guests with another byte order than the host's.",
            unit="bytes",
        ),
    ] = 8192

    # Block devices
    disable_block_device_use: Annotated[
        bool,
        key(
            "now",
            "Give the guest no block devices of the host: the machine has no places for disks that are added later. "
            "File systems on block devices and in image files are then mounted by the host, and shared with the guest.",
        ),
    ] = False
    block_device_driver: Annotated[
        BlockDriver,
        key(
            "now",
            "Disks that are added later, for block devices and image files: `virtio-scsi` has one controller for any "
            "number of them; virtio disks (`virtio-blk-ccw` on s390x) have places for 30, on arm64 for 8. "
            "`virtio-pmem` cannot be added later: a container that needs a disk is refused. The guest's own disks are "
            "virtio disks.",
        ),
    ] = "virtio-blk-pci"
    block_device_aio: Annotated[
        Literal["io_uring", "native", "threads"],
        key(
            "now",
            "How QEMU reads and writes the guest's disks. `io_uring` becomes `threads` on hosts "
            "that forbid it; `native` goes past the host's page cache.",
        ),
    ] = "io_uring"
    block_device_cache_set: Annotated[
        bool, key("now", "Apply the two cache keys below to the guest's disks.")
    ] = False
    block_device_cache_direct: Annotated[bool, key("now", "Go past the host's page cache.")] = False
    block_device_cache_noflush: Annotated[bool, key("now", "Ignore flushes of the guest.")] = False
    block_device_logical_sector_size: Annotated[
        SectorSize,
        key("now", "Logical sector size of disks that are added later; 0 is QEMU's default.", unit="bytes"),
    ] = 0
    block_device_physical_sector_size: Annotated[
        SectorSize,
        key("now", "Physical sector size of disks that are added later; 0 is QEMU's default.", unit="bytes"),
    ] = 0
    enable_iothreads: Annotated[
        bool,
        key(
            "now",
            "A thread of its own for the virtio disk with `image`, and for the controller of `virtio-scsi`.",
        ),
    ] = False
    indep_iothreads: Annotated[
        int,
        key(
            "now",
            "Number of threads that virtio disks added later share, at most 256, with `enable_iothreads` "
            "and unless `disable_block_device_use`.",
            ge=0,
            le=256,
        ),
    ] = 0
    queue_size: Annotated[
        Count, key("now", "Queue depth of the guest's virtio disks, a power of two from 4 to 1024. 0 is 128.")
    ] = 128
    num_queues: Annotated[
        Count, key("now", "Queues of each of the guest's virtio disks, at most 1024. 0 is 1.")
    ] = 1
    disk_rate_limiter_bw_max_rate: Annotated[
        Wide, key("warned", "Disk bandwidth; 0 is no limit.", unit="bit/s", why=_NO_DISK_LIMIT)
    ] = 0
    disk_rate_limiter_bw_one_time_burst: Annotated[
        Wide | None,
        key("ignored", "Bandwidth credit at start.", why="of use only with `disk_rate_limiter_bw_max_rate`"),
    ] = None
    disk_rate_limiter_ops_max_rate: Annotated[
        Wide, key("warned", "Disk operations per second; 0 is no limit.", why=_NO_DISK_LIMIT)
    ] = 0
    disk_rate_limiter_ops_one_time_burst: Annotated[
        Wide | None,
        key(
            "ignored", "Operations credit at start.", why="of use only with `disk_rate_limiter_ops_max_rate`"
        ),
    ] = None
    enable_vhost_user_store: Annotated[
        bool,
        key(
            "now",
            "Give containers disks that other programs of the host serve (SPDK). A device with the major number 241 is "
            "looked up in `vhost_user_store_path`, and QEMU connects to the program's socket. Not together with "
            "`disable_block_device_use` and `rootless`, nor for s390x.",
        ),
    ] = False
    vhost_user_store_path: Annotated[
        str,
        key(
            "now",
            "Directory with `block/devices/NAME`, a device node for each such disk, and `block/sockets/NAME`, the "
            "socket of the program that serves it. Of use only with `enable_vhost_user_store`.",
            hint="make it, with the folders block/devices and block/sockets",
        ),
    ] = "/var/run/vhost-user"
    vhost_user_reconnect_timeout_sec: Annotated[
        Count,
        key(
            "now",
            "Pause before QEMU connects again to a program that has gone away; 0 is never, and its disks then fail.",
            unit="s",
        ),
    ] = 0

    # Buses, devices and networks
    default_bridges: Annotated[
        Count,
        key(
            "warned",
            "PCI bridges for devices added later. 0 is 1, and more than 5 are 5.",
            why="what is added later takes PCIe ports",
            hint="set pcie_root_port",
        ),
    ] = 1
    pcie_root_port: Annotated[Count, key("now", "Spare PCIe root ports, at most 16; s390x has none.")] = 0
    pcie_switch_port: Annotated[
        Count, key("now", "Spare ports of one PCIe switch, at most 16; not together with `pcie_root_port`.")
    ] = 0
    cold_plug_vfio: Annotated[
        Literal["no-port", "root-port", "switch-port", "bridge-port"],
        key(
            "now",
            "Let machines start with devices of the host (VFIO) that their pods ask for, behind ports of this kind. On"
            " s390x, where there are no ports, any kind lets them start with crypto queues.",
        ),
    ] = "no-port"
    hot_plug_vfio: Annotated[
        Literal["no-port", "root-port", "switch-port", "bridge-port"],
        key(
            "now",
            "Plug devices of the host (VFIO) that a container asks for into the running machine, at spare ports of this"
            " kind. There is one at least; `pcie_root_port` and `pcie_switch_port` make more, a bridge has 30. Not for"
            " confidential guests.",
        ),
    ] = "no-port"
    hotplug_vfio_on_root_bus: Annotated[
        bool, key("now", 'An older name of `hot_plug_vfio = "root-port"`.')
    ] = False
    enable_iommu: Annotated[bool, key("now", "Give the guest a virtual IOMMU; s390x has none.")] = False
    enable_iommu_platform: Annotated[
        bool,
        key(
            "now",
            "Virtio devices on channels (s390x) use the platform's IOMMU; those of guests with Secure Execution always "
            "do.",
        ),
    ] = False
    disable_vhost_net: Annotated[
        bool,
        key(
            "now",
            "Carry network packets by QEMU also where the host's kernel could (`/dev/vhost-net`).",
        ),
    ] = False
    network_queues: Annotated[
        Count, key("now", "Queue pairs of each network device. 0 is 1; more than 256 is 256.")
    ] = 1
    rx_rate_limiter_max_rate: Annotated[
        Wide, key("now", f"Limit of what {_EACH} receives; 0 is none.", unit="bit/s")
    ] = 0
    tx_rate_limiter_max_rate: Annotated[
        Wide, key("now", f"Limit of what {_EACH} sends; 0 is none.", unit="bit/s")
    ] = 0
    entropy_source: Annotated[
        str,
        key(
            "now",
            "Host file that feeds a random number device of the guest. With the usual `/dev/urandom` there is"
            " no such device: the guest takes random numbers from its processor.",
        ),
    ] = "/dev/urandom"
    use_legacy_serial: Annotated[
        bool,
        key(
            "ignored",
            "Console on the first serial port. This version always uses it.",
            why="the console is on the first serial port with either value",
        ),
    ] = False
    guest_hook_path: Annotated[
        str,
        key(
            "now",
            "Directory in the guest with OCI hooks, `prestart`, `poststart` and `poststop`. The agent is told"
            " of it; kata-py's own runs none and says so in its log.",
        ),
    ] = ""

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
    disable_seccomp: Annotated[
        bool,
        key(
            "ignored",
            "Turns a filter off that QEMU does not have.",
            why="QEMU's filter is `seccomp_sandbox`, and off unless that is set",
        ),
    ] = False
    rootless: Annotated[
        bool,
        key(
            "now",
            "Run QEMU as a user without a name, another one for each sandbox, who has no capabilities and cannot get "
            "any. Kernel, images and `/dev/kvm` have to be open to such a user. virtiofsd stays root's. Not together "
            "with `enable_hugepages` and `extra_monitor_socket`, nor with shared files of guests with s390x.",
        ),
    ] = False
    rootless_user: RootlessUser = RootlessUser()
    disable_selinux: Annotated[
        bool,
        key("now", "Do not label the QEMU process: `selinux_label` has no effect."),
    ] = False
    selinux_label: Annotated[
        str,
        key(
            "now",
            "SELinux label of the QEMU process, as the host's policy knows it; refused on a host without SELinux. "
            "Empty is what the policy gives to a program that the shim starts.",
            hint="for example system_u:system_r:container_kvm_t:s0",
        ),
    ] = ""
    disable_guest_selinux: Annotated[
        bool,
        key(
            "refused",
            "Do not label containers inside the guest.",
            why="containers would run without the labels",
        ),
    ] = True
    disable_nesting_checks: Annotated[
        bool,
        key(
            "ignored",
            "Do not look whether the host is a guest itself.",
            why="a host that is a guest itself is treated as any other",
        ),
    ] = False
    disable_nested_virtualization: Annotated[
        bool,
        key(
            "now",
            "Hide virtualization features from the guest. arm64 and s390x guests never see any.",
            hint='for example cpu_features = "vmx=off,svm=off"',
        ),
    ] = False
    jailer_path: Annotated[
        str, key("refused", "Program that confines the VMM.", why="QEMU has no jailer")
    ] = ""
    valid_jailer_paths: Annotated[
        tuple[str, ...], key("refused", "Jailers that a pod may ask for.", why="QEMU has no jailer")
    ] = ()
    confidential_guest: Annotated[
        bool,
        key(
            "now",
            "Hide the guest from its host: by Intel TDX or AMD SEV-SNP on a PC, by Secure Execution on s390x; the host "
            "says which. See [confidential.md](confidential.md).",
        ),
    ] = False
    sev_snp_guest: Annotated[
        bool, key("now", "The protection is SEV-SNP. Without this key SEV-SNP is not used.")
    ] = False
    snp_id_block: Annotated[
        str,
        key(
            "now",
            "Identity block of SEV-SNP, base64 of 96 bytes: which guest may start. Together with `snp_id_auth`.",
        ),
    ] = ""
    snp_id_auth: Annotated[
        str,
        key("now", "Signatures and keys of that block, base64 of 4096 bytes."),
    ] = ""
    snp_guest_policy: Annotated[
        int,
        key(
            "now",
            "Policy of SEV-SNP, 64 bits; bit 17 is always set. The default, 0x30000, allows hyper-threading, and no "
            "debugging.",
            ge=0,
        ),
    ] = 0x30000
    tdx_quote_generation_service_socket_port: Annotated[
        int,
        key(
            "now",
            "vsock port of the host's service that signs reports of TDX guests. 0 is "
            "`/var/run/tdx-qgs/qgs.socket` if that exists, else port 4050.",
            ge=0,
            le=U32_MAX - 1,
        ),
    ] = 4050

    # What pods may change
    enable_annotations: Annotated[
        tuple[str, ...],
        key(
            "now",
            "Regular expressions for the keys of this section that pods may set by annotation, each for a whole "
            "name: `kernel_params`, `block_device_.*`.",
        ),
    ] = ()
    valid_hypervisor_paths: Annotated[
        tuple[str, ...], key("now", "Shell patterns for what pods may name as `path`.")
    ] = ()
    valid_virtio_fs_daemon_paths: Annotated[
        tuple[str, ...], key("now", "Shell patterns for what pods may name as `virtio_fs_daemon`.")
    ] = ()
    valid_vhost_user_store_paths: Annotated[
        tuple[str, ...], key("now", "Shell patterns for what pods may name as `vhost_user_store_path`.")
    ] = ()
    valid_entropy_sources: Annotated[
        tuple[str, ...], key("now", "Shell patterns for what pods may name as `entropy_source`.")
    ] = ()
    valid_file_mem_backends: Annotated[
        tuple[str, ...], key("now", "Shell patterns for what pods may name as `file_mem_backend`.")
    ] = ()
    valid_ctlpaths: Annotated[
        tuple[str, ...], key("ignored", "Patterns for `ctlpath`.", why="of other hypervisors")
    ] = ()

    # Debugging
    enable_debug: Annotated[
        bool,
        key(
            "now",
            "Log QEMU's arguments and what it says, bring the agent's log, and let the guest's kernel talk. "
            "Raises `log_level` from info to debug.",
        ),
    ] = False
    log_level: Annotated[
        LogLevel,
        key(
            "now",
            "Least severe message that is logged. The machine and the shim have one log, for which the more "
            "talkative of this and `log_level` of `[runtime]` counts.",
        ),
    ] = "info"
    extra_monitor_socket: Annotated[
        Literal["", "hmp", "qmp", "qmp-pretty"],
        key(
            "now",
            "A second QEMU monitor for people, on `extra-monitor.sock` in the sandbox's directory below "
            "`/run/kata-py`. Only with `enable_debug`.",
        ),
    ] = ""
    guest_memory_dump_path: Annotated[
        str,
        key(
            "now",
            "Directory for the memory of guests whose kernel gives up: `<directory>/<sandbox>/vmcore-<time>.elf`, and "
            "beside it a `.json` with QEMU's arguments and the guest's last words. Twice the guest's memory has to be "
            "free there. Empty saves nothing.",
            hint="name an absolute path",
        ),
    ] = ""
    guest_memory_dump_paging: Annotated[
        bool, key("now", "Write the guest's virtual addresses into it as well.")
    ] = False

    # Accepted for the sake of existing files: other hypervisors, internals of Kata's runtime
    ctlpath: Annotated[
        str, key("ignored", "Control program of other hypervisors.", why="of other hypervisors")
    ] = ""
    enable_guest_swap: Annotated[
        bool,
        key(
            "now",
            "Let containers have swap in the guest, by their annotations; see docs/disks.md. Needs virtio disks "
            "(`block_device_driver`) on a PCI bus.",
        ),
    ] = False
    guest_swap_path: Annotated[
        str,
        key(
            "now",
            "The host's directory for what guests swap out, in files without names; the default is in memory where "
            "`/run` is.",
        ),
    ] = "/run/kata-containers/swap"
    guest_swap_size_percent: Annotated[
        Count, key("ignored", "Swap in relation to memory.", unit="%", why=_SWAP_ONLY)
    ] = 100
    guest_swap_create_threshold_secs: Annotated[
        Count, key("ignored", "Pause before swap is made.", unit="s", why=_SWAP_ONLY)
    ] = 60
    hypervisor_socket: Annotated[str, key("ignored", "Socket of a remote hypervisor.", why=_REMOTE_ONLY)] = ""
    hypervisor_timeout: Annotated[
        Count, key("ignored", "Time that a remote hypervisor may take.", unit="s", why=_REMOTE_ONLY)
    ] = 0
    default_gpus: Annotated[
        Count, key("ignored", "GPUs that a remote hypervisor is asked for.", why=_REMOTE_ONLY)
    ] = 0
    default_gpu_model: Annotated[str, key("ignored", "Model of these GPUs.", why=_REMOTE_ONLY)] = ""
    boot_to_be_template: Annotated[
        bool, key("refused", "This machine becomes a template.", why=_NO_TEMPLATE)
    ] = False
    boot_from_template: Annotated[
        bool, key("refused", "This machine starts from a template.", why=_NO_TEMPLATE)
    ] = False
    memory_path: Annotated[str, key("ignored", "Memory file of a template.", why=_TEMPLATE_ONLY)] = ""
    device_state_path: Annotated[str, key("ignored", "Device state of a template.", why=_TEMPLATE_ONLY)] = ""
    factory: QemuFactory = QemuFactory()

    # Ours
    guest_dir: Annotated[
        str,
        key(
            "now",
            "Where guests of other architectures than the host's are, unless `kernel` and `initrd` say otherwise: "
            "`arm64/vmlinux`, `arm64/initrd.img` and so on. `kata-py guest build --arch arm64` makes them. They stand "
            "in for files that are named here when a pod's `machine_type`, or its image, wants another architecture. "
            "A key of kata-py's own.",
        ),
    ] = DEFAULT_GUESTS
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

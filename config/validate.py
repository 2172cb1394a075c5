"""What no single key can tell: limits of the host, files that must exist, keys that must fit each other.

Each topic is adjusted first (0 becomes a number, an empty path the usual one) and checked afterwards, as Kata
does. Only keys with an effect are looked at.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from config.describe import show
from config.schema import Agent, Config, GuestExtensionImage, Qemu, Runtime, info
from config.schema.hypervisor import (
    ARCHITECTURES,
    DEFAULT_INITRD,
    DEFAULT_KERNEL,
    DEFAULT_QEMU,
    DEFAULT_QEMUS,
    FIRMWARE_HINT,
    QEMU_PACKAGES,
    SEALED_MACHINE,
)
from config.tree import KeyPath, Report

VIRTIOFSD_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
# More needs interrupt remapping from a virtual IOMMU, which this machine does not have.
MAX_VCPUS = 256
MIN_MEMORY_MIB = 64
_MAX_BRIDGES = 5
_MAX_PORTS = 16
# A tap has as many, <linux/if_tun.h>.
_MOST_NETWORK_QUEUES = 256
# Of virtio disks in QEMU: the length of a queue, which is a power of two, and the number of queues.
_LEAST_DISK_QUEUE, _MOST_DISK_QUEUES = 4, 1024

# Kata's size of a window that is asked for without one.
_DAX_MIB = 1024

_PROPERTY = re.compile(r"[+-]?[A-Za-z0-9][A-Za-z0-9._-]*(=.*)?")
# What would go around the checks of the keys that these belong to.
_OWN_MACHINE_PROPERTIES = {
    "accel": "accel",
    "append": "kernel_params",
    "confidential-guest-support": "confidential_guest",
    "firmware": "firmware",
    "initrd": "initrd",
    "kernel": "kernel",
    "memory": "default_memory",
    "memory-backend": "default_memory",
    "memory-encryption": "confidential_guest",
    "nvdimm": "vm_rootfs_driver",
    "pflash0": "pflashes",
    "pflash1": "pflashes",
    "smp": "default_vcpus",
    "type": "machine_type",
}

_SECCOMP_CLASSES = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")

_OF_PROTECTION = ("confidential_guest", "sev_snp_guest", "snp_id_block", "snp_id_auth", "snp_guest_policy")

Changes = dict[str, Any]


class HostLimits(NamedTuple):
    """What the machine that runs the guests has."""

    cpus: int
    memory_mib: int
    machine_type: str = "q35"
    """That of its own architecture; empty when there is none."""

    @classmethod
    def of_this_host(cls) -> "HostLimits":
        """All CPUs and all memory, whoever uses them at the moment."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        machines = {"x86_64": "q35", "aarch64": "virt", "s390x": "s390-ccw-virtio"}
        return cls(os.cpu_count() or 1, memory // 2**20, machines.get(os.uname().machine, ""))


def adjust_and_validate(config: Config, host: HostLimits, report: Report) -> Config:
    """Give the configuration that will be used; problems go to `report`."""
    agent, runtime = config.agent, config.runtime
    where: KeyPath = ("hypervisor", runtime.hypervisor_name)
    qemu = _protected(config.hypervisor, where, report)
    topics = _QemuTopics(qemu, where, report)
    _check_agent(agent, ("agent", runtime.agent_name), report)
    return Config(
        hypervisor=replace(
            qemu,
            **topics.processors(host),
            **topics.memory(host),
            **topics.files(host),
            **topics.initdata(),
            **topics.sharing(),
            **topics.words(),
            **topics.buses(),
            **topics.disks(),
            **topics.seccomp(),
            **topics.for_pods(),
            log_level=_level(qemu.enable_debug, qemu.log_level),
        ),
        agent=replace(agent, log_level=_level(agent.enable_debug, agent.log_level)),
        runtime=replace(
            runtime,
            sandbox_bind_mounts=_guest_files(runtime, qemu, report),
            log_level=_level(runtime.enable_debug, runtime.log_level),
        ),
        factory=config.factory,
    )


def _level(enable_debug: bool, log_level: str) -> str:
    return "debug" if enable_debug and log_level == "info" else log_level


def _guest_files(runtime: Runtime, qemu: Qemu, report: Report) -> tuple[str, ...]:
    if not (runtime.sandbox_bind_mounts or runtime.shared_mounts):
        return ()
    from config import guest_files  # few configurations have either

    guest_files.check_shared_mounts(runtime, report)
    return guest_files.bind_mounts(runtime, qemu, report) if runtime.sandbox_bind_mounts else ()


def _protected(qemu: Qemu, where: KeyPath, report: Report) -> Qemu:
    """The guest with what a confidential one can have, and whatever is to be said about its keys."""
    builtin = Qemu()
    if all(getattr(qemu, name) == getattr(builtin, name) for name in _OF_PROTECTION):
        return qemu  # most files: the rest need not be loaded
    from config.confidential import problems, without

    for bad in problems(qemu):
        others = ((*where, "confidential_guest"),) if bad.key != "confidential_guest" else ()
        report.add((*where, bad.key), bad.text, bad.hint, also=others)
    qemu, lost = without(qemu)
    for remark in lost:
        report.remark((*where, remark.key), remark.text, remark.hint)
    return qemu


class _QemuTopics:
    """The topics of `[hypervisor.qemu]`; every method gives the values that it adjusted."""

    def __init__(self, qemu: Qemu, where: KeyPath, report: Report) -> None:
        self._qemu = qemu
        self._where = where
        self._report = report

    def processors(self, host: HostLimits) -> Changes:
        cap = min(host.cpus, MAX_VCPUS)
        most = self._qemu.default_maxvcpus
        most = most if 0 < most <= cap else cap
        boot = self._qemu.default_vcpus or 1.0
        if math.isnan(boot):
            self._bad("default_vcpus", "want a number, got nan")
        boot = boot if 0 < boot <= cap else cap
        return {"default_vcpus": float(min(boot, most)), "default_maxvcpus": most}

    def memory(self, host: HostLimits) -> Changes:
        most = self._qemu.default_maxmemory
        most = most if 0 < most <= host.memory_mib else host.memory_mib
        boot = min(self._qemu.default_memory or 128, host.memory_mib)
        if boot < MIN_MEMORY_MIB:
            self._bad(
                "default_memory", f"{boot} MiB is too little for a guest, want at least {MIN_MEMORY_MIB}"
            )
        elif boot > most:
            self._bad(
                "default_maxmemory",
                f"{most} MiB is less than the {boot} of default_memory",
                also="default_memory",
            )
        slots = self._qemu.memory_slots or 128
        return {"default_memory": boot, "default_maxmemory": most, "memory_slots": slots}

    def files(self, host: HostLimits) -> Changes:
        qemu = self._qemu
        sealed = qemu.confidential_guest and qemu.machine_type == SEALED_MACHINE
        kernel, initrd = qemu.kernel, qemu.initrd or ("" if qemu.image or sealed else DEFAULT_INITRD)
        build = firmware = ""
        if qemu.confidential_guest:
            build, firmware = "install a guest made for this, as Kata Containers has them", FIRMWARE_HINT
        elif qemu.machine_type != host.machine_type:
            arch = ARCHITECTURES[qemu.machine_type]
            build = f"build the guest with: kata-py guest build --arch {arch}"
            folder = f"{qemu.guest_dir}/{arch}"
            kernel = f"{folder}/vmlinux" if kernel == DEFAULT_KERNEL else kernel
            initrd = f"{folder}/initrd.img" if initrd == DEFAULT_INITRD else initrd
        if not qemu.kernel:
            self._bad("kernel", "want a file, got ''")
        dumps = qemu.guest_memory_dump_path
        if dumps and not dumps.startswith("/"):
            self._bad("guest_memory_dump_path", f"want an absolute path, got {show(dumps)}")
        if qemu.selinux_label and not re.fullmatch(r"[^\s:]+(:[^\s:]+){2}(:\S+)?", qemu.selinux_label):
            self._bad(
                "selinux_label", f"{show(qemu.selinux_label)} is not user:role:type or user:role:type:level"
            )
        if qemu.image and qemu.initrd:
            self._bad(
                "image", "a guest has an image or an initrd, not both", "remove one of them", also="initrd"
            )
        if qemu.image_initrd and not qemu.image:
            self._bad("image_initrd", "is of use only with image", "remove it, or set image", also="image")
        if qemu.image and qemu.vm_rootfs_driver in ("virtio-scsi", "virtio-blk-mmio"):
            self._bad(
                "vm_rootfs_driver", f"the machine has no {qemu.vm_rootfs_driver} for image", also="image"
            )
        if qemu.file_mem_backend and not (
            qemu.file_mem_backend.startswith("/") and os.path.isdir(qemu.file_mem_backend)
        ):
            self._bad("file_mem_backend", f"{show(qemu.file_mem_backend)} is no directory")
        if qemu.file_mem_backend and qemu.enable_hugepages and qemu.hugepage_type == "hugetlbfs":
            problem = "guest memory is files or huge pages, not both"
            self._bad("file_mem_backend", problem, "remove one of them", also="enable_hugepages")
        if qemu.rootless and qemu.enable_hugepages and qemu.hugepage_type == "hugetlbfs":
            self._bad(
                "rootless", "huge pages are for root only", "remove one of them", also="enable_hugepages"
            )
        if qemu.rootless and qemu.extra_monitor_socket and qemu.enable_debug:
            problem = "QEMU cannot make a socket in root's directory"
            self._bad("rootless", problem, "remove one of them", also="extra_monitor_socket")
        if qemu.firmware_volume and not qemu.firmware:
            self._bad("firmware_volume", "is of use only with firmware", also="firmware")
        if qemu.firmware and qemu.pflashes:
            self._bad(
                "pflashes", "firmware is a file or flash memory, not both", "remove one", also="firmware"
            )
        if qemu.kernel_verity_params:
            from config import verity

            if problem := verity.problem_of(qemu.kernel_verity_params):
                self._bad("kernel_verity_params", problem)
            elif not qemu.image:
                self._bad(
                    "kernel_verity_params",
                    "is of use only with image",
                    "set image, or remove it",
                    also="image",
                )
        default = DEFAULT_QEMUS[qemu.machine_type]
        path = default if qemu.path in ("", DEFAULT_QEMU) else qemu.path
        install = f"install {QEMU_PACKAGES[qemu.machine_type]} or name QEMU's system emulator here"
        return {
            "guest_extension_images": self._extensions(),
            "path": self._file("path", path, executable=True, hint=install),
            "firmware_volume": self._file("firmware_volume", qemu.firmware_volume),
            "pflashes": tuple(self._file("pflashes", name) for name in qemu.pflashes if name),
            "kernel": self._file("kernel", kernel, hint=build),
            "initrd": self._file("initrd", initrd, hint=build),
            "image": self._file("image", qemu.image),
            "image_initrd": self._file("image_initrd", qemu.image_initrd),
            "firmware": self._file("firmware", qemu.firmware, hint=firmware),
            "entropy_source": self._file("entropy_source", qemu.entropy_source or "/dev/urandom"),
        }

    def initdata(self) -> Changes:
        if self._qemu.initdata:
            from config.initdata import parse

            try:
                parse(self._qemu.initdata)
            except ValueError as err:
                self._bad("initdata", str(err))
        return {}

    def sharing(self) -> Changes:
        qemu = self._qemu
        size = qemu.virtio_fs_queue_size or 1024
        if size & (size - 1):
            self._bad("virtio_fs_queue_size", f"want a power of two, got {size}")
        self._check_lines("virtio_fs_extra_args", qemu.virtio_fs_extra_args)
        cache = "never" if qemu.virtio_fs_cache == "none" else qemu.virtio_fs_cache
        daemon = qemu.virtio_fs_daemon
        if qemu.shared_fs != "none":
            daemon = self._virtiofsd()
        window = qemu.virtio_fs_cache_size or (_DAX_MIB if qemu.virtio_fs_is_dax else 0)
        return {
            "virtio_fs_queue_size": size,
            "virtio_fs_cache": cache,
            "virtio_fs_daemon": daemon,
            "virtio_fs_cache_size": window,
            "virtio_fs_is_dax": window > 0,
        }

    def words(self) -> Changes:
        changes: Changes = {}
        for name in ("machine_accelerators", "cpu_features"):
            # An empty part would be a doubled comma, which QEMU takes for a comma inside a value.
            parts = [part.strip() for part in getattr(self._qemu, name).split(",") if part.strip()]
            changes[name] = ",".join(parts)
            if changes[name].isprintable():
                self._check_properties(name, parts)
            else:
                self._check_lines(name, (changes[name],))
        self._check_lines("kernel_params", (self._qemu.kernel_params,))
        return changes

    def _check_properties(self, name: str, parts: list[str]) -> None:
        """They become properties of the machine or the processor as they are written."""
        for part in parts:
            if not _PROPERTY.fullmatch(part) or (part[0] in "+-" and name != "cpu_features"):
                self._bad(name, f"want properties as in a=b,c=d, got {show(part)}")
            key = part.partition("=")[0]
            if name == "machine_accelerators" and key in _OWN_MACHINE_PROPERTIES:
                self._bad(name, f"{key} of the machine is set by another key: {_OWN_MACHINE_PROPERTIES[key]}")

    def disks(self) -> Changes:
        size, queues = self._qemu.queue_size or 128, self._qemu.num_queues or 1
        if size & (size - 1) or not _LEAST_DISK_QUEUE <= size <= _MOST_DISK_QUEUES:
            self._bad(
                "queue_size", f"want a power of two, {_LEAST_DISK_QUEUE} to {_MOST_DISK_QUEUES}, got {size}"
            )
        if queues > _MOST_DISK_QUEUES:
            self._bad("num_queues", f"want at most {_MOST_DISK_QUEUES}, got {queues}")
        if self._qemu.enable_vhost_user_store:
            self._check_vhost_user_store()
        if self._qemu.enable_guest_swap:
            self._check_swap()
        return {"queue_size": size, "num_queues": queues}

    def _check_swap(self) -> None:
        qemu, name = self._qemu, "enable_guest_swap"
        if qemu.disable_block_device_use:
            problem = "no disk reaches the guest with disable_block_device_use"
            self._bad(name, problem, "set that to false", also="disable_block_device_use")
        if qemu.machine_type == "s390-ccw-virtio":
            self._bad(name, "guests with s390x have no swap", "remove it", also="machine_type")
        elif qemu.block_device_driver != "virtio-blk-pci":
            problem = f"swap is on virtio disks, and block_device_driver is {qemu.block_device_driver}"
            self._bad(name, problem, "set that to virtio-blk-pci", also="block_device_driver")

    def _check_vhost_user_store(self) -> None:
        qemu, name = self._qemu, "enable_vhost_user_store"
        if qemu.disable_block_device_use:
            problem = "no disk reaches the guest with disable_block_device_use"
            self._bad(name, problem, "set that to false", also="disable_block_device_use")
        if qemu.rootless:
            problem = "QEMU cannot open the sockets of other programs with rootless"
            self._bad(name, problem, "remove one of them", also="rootless")
        if qemu.machine_type == "s390-ccw-virtio":
            problem = "guests with s390x have no disks that other programs serve"
            self._bad(name, problem, "remove it", also="machine_type")
        path = qemu.vhost_user_store_path
        if not (path.startswith("/") and path.isprintable() and os.path.isdir(path)):
            self._bad("vhost_user_store_path", f"{show(path)} is no directory", also=name)

    def buses(self) -> Changes:
        if self._qemu.enable_iommu_platform and self._qemu.machine_type != "s390-ccw-virtio":
            self._bad(
                "enable_iommu_platform",
                f"a machine of type {self._qemu.machine_type} has no devices on channels",
                "set enable_iommu for a virtual IOMMU",
                also="machine_type",
            )
        on_channels = self._qemu.machine_type == "s390-ccw-virtio"
        numa = "numa_mapping" if self._qemu.numa_mapping else "enable_numa"
        if getattr(self._qemu, numa) and on_channels:
            self._bad(numa, "guests with s390x have no NUMA nodes", "remove it", also="machine_type")
        if self._qemu.numa_mapping:
            self._check_numa_mapping()
        if self._qemu.enable_iommu and on_channels:
            self._bad(
                "enable_iommu", "guests with s390x have no virtual IOMMU", "remove it", also="machine_type"
            )
        ports = {name: getattr(self._qemu, name) for name in ("pcie_root_port", "pcie_switch_port")}
        for name, number in ports.items():
            if number > _MAX_PORTS:
                self._bad(name, f"want at most {_MAX_PORTS}, got {number}")
            elif number and on_channels:
                self._bad(name, "guests with s390x have no PCIe ports", "set it to 0", also="machine_type")
        if all(ports.values()):
            problem = "spare ports are of the root complex or of a switch, not of both"
            self._bad("pcie_switch_port", problem, "set one of them to 0", also="pcie_root_port")
        hot_plug_vfio = self._host_devices(ports)
        hooks = self._qemu.guest_hook_path
        if hooks and not (hooks.startswith("/") and hooks.isprintable() and ".." not in hooks.split("/")):
            self._bad("guest_hook_path", f"want an absolute path in the guest, got {show(hooks)}")
        return {
            "hot_plug_vfio": hot_plug_vfio,
            "default_bridges": min(self._qemu.default_bridges or 1, _MAX_BRIDGES),
            "network_queues": min(self._qemu.network_queues or 1, _MOST_NETWORK_QUEUES),
        }

    def _host_devices(self, ports: Mapping[str, int]) -> str:
        """The kind of ports that devices of the host are plugged into."""
        qemu = self._qemu
        hot, cold = qemu.hot_plug_vfio, qemu.cold_plug_vfio
        if qemu.hotplug_vfio_on_root_bus:
            if hot not in ("no-port", "root-port"):
                problem = f'means hot_plug_vfio = "root-port", which is {show(hot)}'
                self._bad("hotplug_vfio_on_root_bus", problem, "remove it", also="hot_plug_vfio")
            hot = "root-port"
        if "no-port" not in (hot, cold) and hot != cold:
            problem = "devices of the host are behind one kind of ports"
            self._bad("hot_plug_vfio", problem, f"set it to {show(cold)} as well", also="cold_plug_vfio")
        kind = hot if hot != "no-port" else cold
        key = "hot_plug_vfio" if qemu.hot_plug_vfio != "no-port" else "cold_plug_vfio"
        other = {"root-port": "pcie_switch_port", "switch-port": "pcie_root_port"}.get(kind)
        if other is not None and ports[other]:
            problem = f"{show(kind)} and {other} are different kinds of ports, and a machine has those of one"
            self._bad(key, problem, f"set {other} to 0", also=other)
        if hot == "bridge-port" and qemu.machine_type == "virt":
            self._bad(
                "hot_plug_vfio",
                "arm64 guests do not notice what is plugged in behind a bridge",
                'use "root-port"',
                also="machine_type",
            )
        return hot

    def _check_numa_mapping(self) -> None:
        from config import numa

        if len(self._qemu.numa_mapping) > numa.MOST_GUEST_NODES:
            self._bad("numa_mapping", f"want at most {numa.MOST_GUEST_NODES} nodes")
        for index, entry in enumerate(self._qemu.numa_mapping):
            try:
                numa.nodes_of(entry)
            except ValueError as err:
                where = (*self._where, "numa_mapping", index)
                self._report.add(where, f"{err}, got {show(entry)}", info(Qemu, "numa_mapping").hint)

    def seccomp(self) -> Changes:
        new, old = self._qemu.seccomp_sandbox, self._qemu.seccompsandbox
        if new and old and new != old:
            self._bad(
                "seccompsandbox", f"is {show(old)}, but seccomp_sandbox is {show(new)}", "keep one of them"
            )
        name = "seccomp_sandbox" if new or not old else "seccompsandbox"
        switch, *rules = (new or old).split(",")
        known = {f"{rule}={verdict}" for rule in _SECCOMP_CLASSES for verdict in ("allow", "deny")}
        known.add("elevateprivileges=children")
        if switch not in ("on", "off", "") or not known.issuperset(rules) or (rules and switch != "on"):
            self._bad(name, f"{show(new or old)} is not a filter that QEMU knows")
        return {"seccomp_sandbox": "" if switch == "off" else new or old}

    def for_pods(self) -> Changes:
        for index, pattern in enumerate(self._qemu.enable_annotations):
            try:
                with warnings.catch_warnings():
                    # What a later Python may read in another way, as `[[`, is no concern of who reads a log.
                    warnings.simplefilter("ignore", FutureWarning)
                    re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                where = (*self._where, "enable_annotations", index)
                self._report.add(where, f"{show(pattern)} is not a regular expression")
        return {}

    def _virtiofsd(self) -> str:
        if self._qemu.virtio_fs_daemon:
            return self._file("virtio_fs_daemon", self._qemu.virtio_fs_daemon, executable=True)
        found = next((place for place in VIRTIOFSD_PLACES if os.access(place, os.X_OK)), "")
        if not found:
            self._bad(
                "virtio_fs_daemon",
                f"there is no virtiofsd at {' or '.join(VIRTIOFSD_PLACES)}",
                'install virtiofsd, name the program here, or set shared_fs to "none"',
            )
        return found

    def _file(self, name: str, path: str, *, executable: bool = False, hint: str = "") -> str:
        """The path without symbolic links, once known to name a usable file; an empty one stays empty."""
        if not path:
            return path
        return self._file_at(
            (*self._where, name), path, executable=executable, hint=hint or info(Qemu, name).hint
        )

    def _file_at(self, where: KeyPath, path: str, *, executable: bool = False, hint: str = "") -> str:
        shown = path if path.isprintable() else show(path)
        if not path.startswith("/"):
            # It would be looked up in the bundle of whichever container comes first.
            problem = f"want an absolute path, got {show(path)}"
        elif not os.path.exists(path):
            problem = f"{shown} does not exist"
        elif os.path.isdir(path):
            problem = f"{shown} is a directory, want a file"
        elif executable and not os.access(path, os.X_OK):
            problem = f"{shown} is not executable"
        else:
            return os.path.realpath(path)
        self._report.add(where, problem, hint)
        return path

    def _extensions(self) -> tuple[GuestExtensionImage, ...]:
        if not self._qemu.guest_extension_images:
            return ()
        from config import extensions

        where = (*self._where, "guest_extension_images")
        return extensions.adjusted(self._qemu.guest_extension_images, where, self._report, self._file_at)

    def _check_lines(self, name: str, words: Sequence[str]) -> None:
        for word in words:
            if not word.isprintable():
                self._bad(name, f"want printable text on one line, got {show(word)}")

    def _bad(self, name: str, problem: str, hint: str = "", *, also: str = "") -> None:
        hint = hint or info(Qemu, name).hint
        others = ((*self._where, also),) if also else ()
        self._report.add((*self._where, name), problem, hint, also=others)


def _check_agent(agent: Agent, where: KeyPath, report: Report) -> None:
    dial, reconnect = (*where, "dial_timeout_ms"), (*where, "reconnect_timeout_ms")
    if agent.reconnect_timeout_ms < agent.dial_timeout_ms:
        problem = f"{agent.reconnect_timeout_ms} is less than the {agent.dial_timeout_ms} of dial_timeout_ms"
        report.add(reconnect, problem, also=(dial,))
    if agent.server_port == agent.log_port:
        report.add(
            (*where, "log_port"), f"is {agent.log_port}, as server_port is", also=((*where, "server_port"),)
        )
    for index, module in enumerate(agent.kernel_modules):
        if not module.strip() or not module.isprintable():
            report.add(
                (*where, "kernel_modules", index), f"want a module's name and parameters, got {show(module)}"
            )
    address = agent.server_addr
    if address and not (address.startswith("unix:/") and address.isprintable()):
        hint = info(Agent, "server_addr").hint
        report.add((*where, "server_addr"), f"{show(address)} is not an address of an agent", hint)

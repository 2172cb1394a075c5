"""What no single key can tell: limits of the host, files that must exist, keys that must fit each other.

Each topic is adjusted first (0 becomes a number, an empty path the usual one) and checked afterwards, as Kata
does. Only keys with an effect are looked at.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from config.describe import show
from config.schema import Agent, Config, Qemu, info
from config.schema.hypervisor import DEFAULT_INITRD, DEFAULT_QEMU
from config.tree import KeyPath, Report

VIRTIOFSD_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
# More needs interrupt remapping from a virtual IOMMU, which this machine does not have.
MAX_VCPUS = 256
MIN_MEMORY_MIB = 64

_SECCOMP_CLASSES = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")

Changes = dict[str, Any]


class HostLimits(NamedTuple):
    """What the machine that runs the guests has."""

    cpus: int
    memory_mib: int

    @classmethod
    def of_this_host(cls) -> "HostLimits":
        """All CPUs and all memory, whoever uses them at the moment."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(os.cpu_count() or 1, memory // 2**20)


def adjust_and_validate(config: Config, host: HostLimits, report: Report) -> Config:
    """Give the configuration that will be used; problems go to `report`."""
    qemu, agent, runtime = config.hypervisor, config.agent, config.runtime
    topics = _QemuTopics(qemu, ("hypervisor", runtime.hypervisor_name), report)
    _check_agent(agent, ("agent", runtime.agent_name), report)
    return Config(
        hypervisor=replace(
            qemu,
            **topics.processors(host),
            **topics.memory(host),
            **topics.files(),
            **topics.sharing(),
            **topics.words(),
            **topics.seccomp(),
            log_level=_level(qemu.enable_debug, qemu.log_level),
        ),
        agent=replace(agent, log_level=_level(agent.enable_debug, agent.log_level)),
        runtime=replace(runtime, log_level=_level(runtime.enable_debug, runtime.log_level)),
        factory=config.factory,
    )


def _level(enable_debug: bool, log_level: str) -> str:
    return "debug" if enable_debug and log_level == "info" else log_level


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

    def files(self) -> Changes:
        qemu = self._qemu
        if not qemu.kernel:
            self._bad("kernel", "want a file, got ''")
        if qemu.image and qemu.initrd:
            self._bad(
                "image", "a guest has an image or an initrd, not both", "remove one of them", also="initrd"
            )
        extensions = tuple(image for image in qemu.guest_extension_images if image.path)
        return {
            "guest_extension_images": extensions,
            "path": self._file("path", qemu.path or DEFAULT_QEMU, executable=True),
            "kernel": self._file("kernel", qemu.kernel),
            "initrd": self._file("initrd", qemu.initrd or ("" if qemu.image else DEFAULT_INITRD)),
            "image": self._file("image", qemu.image),
            "firmware": self._file("firmware", qemu.firmware),
            "entropy_source": self._file("entropy_source", qemu.entropy_source or "/dev/urandom"),
        }

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
        return {"virtio_fs_queue_size": size, "virtio_fs_cache": cache, "virtio_fs_daemon": daemon}

    def words(self) -> Changes:
        changes: Changes = {}
        for name in ("machine_accelerators", "cpu_features"):
            parts = [part.strip() for part in getattr(self._qemu, name).split(",")]
            # An empty part would be a doubled comma, which QEMU takes for a comma inside a value.
            changes[name] = ",".join(filter(None, parts))
            self._check_lines(name, (changes[name],))
        self._check_lines("kernel_params", (self._qemu.kernel_params,))
        return changes

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

    def _file(self, name: str, path: str, *, executable: bool = False) -> str:
        """The path without symbolic links, once known to name a usable file; an empty one stays empty."""
        if not path:
            return path
        shown = path if path.isprintable() else show(path)
        if not path.startswith("/"):
            # It would be looked up in the bundle of whichever container comes first.
            self._bad(name, f"want an absolute path, got {show(path)}")
        elif not os.path.exists(path):
            self._bad(name, f"{shown} does not exist")
        elif os.path.isdir(path):
            self._bad(name, f"{shown} is a directory, want a file")
        elif executable and not os.access(path, os.X_OK):
            self._bad(name, f"{shown} is not executable")
        else:
            return os.path.realpath(path)
        return path

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

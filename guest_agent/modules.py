"""Loads kernel modules from the list the image's builder prepared; there is no modprobe in the guest.

The list has one line per module, "name file needed-module...". A module that is neither in the list nor built
into the kernel does not exist.
"""

from __future__ import annotations

import errno
import os

from guest_agent import syscalls

LIST = "/usr/lib/kata-py/modules"
BUILTIN = "/usr/lib/kata-py/modules.builtin"
#: What makes the host reachable. Names that are built into the kernel are not in the list and are skipped.
BOOT = ("virtio_pci", "vmw_vsock_virtio_transport")


DEVICES = "/sys/bus/virtio/devices"
#: Drivers of devices that nothing else here asks for, by the virtio standard's number of the device's type.
DRIVERS = {4: "virtio_rng", 5: "virtio_balloon", 24: "virtio_mem"}


class ModuleMissing(Exception):
    """The image has no such kernel module."""


class Modules:
    """The image's modules, and which of them this process has loaded."""

    def __init__(self, list_path: str = LIST, builtin_path: str = BUILTIN) -> None:
        self._builtin_path = builtin_path
        self._loaded: set[str] = set()
        self._available: dict[str, list[str]] = {}
        try:
            with open(list_path) as file:
                for line in file:
                    name, *rest = line.split()
                    self._available[name] = rest
        except FileNotFoundError:
            pass  # an image whose kernel has everything built in

    def load_if_present(self, name: str) -> None:
        """Load a module and what it needs; nothing to do when it is built in. Raises OSError."""
        if name in self._available:
            self._load(name, "")

    def load_for_devices(self, devices: str = DEVICES) -> None:
        """Load the drivers of what the machine has that few machines have. Raises OSError."""
        if not os.path.isdir(devices):
            return  # a kernel without virtio: the agent is not in a guest of ours
        for device in os.listdir(devices):
            with open(f"{devices}/{device}/device") as file:
                driver = DRIVERS.get(int(file.read(), 16))
            if driver is not None:
                self.load_if_present(driver)

    def load(self, name: str, parameters: str = "") -> None:
        """Load a module somebody asked for by name. Raises ModuleMissing, OSError."""
        plain = name.replace("-", "_")
        if plain in self._available:
            self._load(plain, parameters)
        elif not self._is_builtin(plain):
            raise ModuleMissing(f"the guest image has no kernel module {name!r}")

    def _load(self, name: str, parameters: str) -> None:
        if name in self._loaded:
            return
        path, *needed = self._available[name]
        for other in needed:
            if other in self._available:
                self._load(other, "")
        with open(path, "rb") as file:
            image = file.read()
        if path.endswith(".z"):
            import zlib

            image = zlib.decompress(image)
        try:
            syscalls.init_module(image, parameters, name)
        except OSError as err:
            if err.errno != errno.EEXIST:
                raise
        self._loaded.add(name)

    def _is_builtin(self, name: str) -> bool:
        try:
            with open(self._builtin_path) as file:
                return name in file.read().split()
        except FileNotFoundError:
            return False

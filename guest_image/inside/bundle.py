# mypy: ignore-errors
"""Runs in the guest: imports modules from one file instead of searching directories for each of them.

A search costs about a millisecond per module under emulation, and the agent has a hundred of them. The file is
made by `guest_image.contents`: eight bytes with the size of the index, the index, then the bytecode.
The index, in marshal's format, is {name: (offset, size, is package)}, {name: path} for a shared library, or {name:
number of a group} and {number: (offset, size)}. What is imported together is in one group, [(name, is package, code)]
in the order in which these imports end: read at once, and made without what an import does beside that.
"""

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import ExtensionFileLoader

PATH = "/usr/lib/kata-py/python"


class Bundle:
    """Finder and loader in one; see importlib.abc for the roles."""

    def __init__(self, path):
        self._fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        size = int.from_bytes(posix.read(self._fd, 8), "little")
        self._index = marshal.loads(posix.read(self._fd, size))  # noqa: S302
        self._start = 8 + size
        self._made = {}

    def find_spec(self, name, path=None, target=None):
        entry = self._index.get(name)
        if type(entry) is int:
            self._make(*self._index[entry])
            entry = self._made[name]
        if entry is None:
            return None
        if type(entry) is str:
            return ModuleSpec(name, ExtensionFileLoader(name, entry), origin=entry)
        return ModuleSpec(name, self, is_package=entry[2])

    def create_module(self, spec):
        return sys.modules.get(spec.name) if spec.name in self._made else None

    def exec_module(self, module):
        if module.__name__ not in self._made:
            offset, size, _ = self._index[module.__name__]
            exec(self._read(offset, size), module.__dict__)  # noqa: S102

    def _read(self, offset, size):
        return marshal.loads(posix.pread(self._fd, size, self._start + offset))  # noqa: S302

    def _make(self, offset, size):
        group = self._read(offset, size)
        modules = sys.modules
        for name, is_package, _ in group:
            self._made[name] = self._index[name] = (0, 0, is_package)
            # Packages are there before those that are in them, as with any import.
            if is_package:
                package = modules[name] = type(sys)(name)
                package.__path__ = []
        for name, is_package, code in group:
            parent, _, child = name.rpartition(".")
            if not is_package:
                modules[name] = type(sys)(name)
            module = modules[name]
            module.__package__ = name if is_package else parent
            exec(code, module.__dict__)  # noqa: S102
            if parent:
                setattr(modules[parent], child, module)


def install(path=PATH):
    sys.meta_path.insert(0, Bundle(path))
    # What is not in the bundle is nowhere: an import of something optional fails without a search.
    sys.path.clear()

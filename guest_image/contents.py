"""Puts the parts of the guest's root file system into a tree: programs, libraries, Python, kernel modules."""

from __future__ import annotations

import marshal
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from guest_image.elf import Elf
from guest_image.errors import ImageError
from guest_image.python_set import AGENT_PACKAGES, EARLY_MODULES
from guest_image.tools import LOADERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_image.cpio import Tree
    from guest_image.kernel import Module
    from guest_image.python_set import ModuleSet
    from guest_image.tools import Root

#: Where the agent finds what the builder made for it.
DATA_DIR = "/usr/lib/kata-py"
BUNDLE = f"{DATA_DIR}/python"
#: Old enough for every interpreter to read, whatever interpreter runs the build.
MARSHAL_VERSION = 2


class Contents:
    """A tree being filled, with a tally of bytes by kind of content."""

    def __init__(self, tree: Tree, root: Root) -> None:
        self.tree = tree
        self.parts: dict[str, int] = {}
        self.packages: set[str] = set()
        """Names of the packages that something was taken from."""
        self.notes: list[str] = []
        self._root = root
        self._library_dir = f"/usr/lib/{LOADERS[root.arch][0]}-linux-gnu"

    def add(self, part: str, path: str, data: bytes, mode: int = 0o644) -> None:
        self.tree.file(path, data, mode)
        self.parts[part] = self.parts.get(part, 0) + len(data)

    def _taken(self, source: Path) -> bytes:
        """Read a file of the unpacked packages, or of anywhere else, and remember whose it is."""
        owner = self._root.owner(source)
        if owner is not None:
            self.packages.add(owner)
        return source.read_bytes()

    def skeleton(self, python_name: str) -> None:
        """Mount points, the links of the merged /usr, the console, and the /init the kernel starts.

        The kernel runs the script without any argument or environment of ours, so the same command line starts
        this image and any other.
        """
        for name in ("dev", "proc", "sys", "run", "mnt", "etc", "root", "var"):
            self.tree.directory(name)
        self.tree.directory("tmp", 0o1777)
        for name in ("bin", "lib", "lib64", "sbin"):
            self.tree.directory(f"usr/{name}")
            self.tree.symlink(name, f"usr/{name}")
        # The kernel opens it as PID 1's stdin, stdout and stderr before anything is mounted.
        self.tree.character_device("dev/console", 5, 1)
        self.tree.character_device("dev/null", 1, 3, 0o666)
        start = "import bundle; bundle.install(); import guest_agent.__main__ as agent; agent.main()"
        self.add("agent", "init", f"#!/usr/bin/{python_name} -IS\n{start}\n".encode(), 0o755)
        self.add("agent", "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        self.add("agent", "etc/group", b"root:x:0:\n")
        self.add("agent", "etc/resolv.conf", b"")

    def program(self, part: str, source: Path, target: str) -> None:
        """A program with its loader and every library it needs."""
        data = self._taken(source)
        self.add(part, target, data, 0o755)
        elf = Elf(data, source.name)
        loader = elf.interpreter()
        if loader is not None and loader not in self.tree:
            self.tree.symlink(_merged(loader), f"{self._library_dir}/{Path(loader).name}")
            self.library(Path(loader).name)
        for name in elf.needed():
            self.library(name)

    def seldom_program(self, part: str, source: Path) -> None:
        """A program that few guests run: it and the libraries that nothing else has are compressed with zlib, which the
        guest's interpreter has built in, in a folder of its own."""
        left, done = [(source.name, source)], set()
        while left:
            name, path = left.pop()
            if name in done or f"{self._library_dir}/{name}" in self.tree:
                continue
            done.add(name)
            data = self._taken(path.resolve())
            self.add(part, f"{DATA_DIR}/programs/{source.name}/{name}.z", zlib.compress(data, 9))
            left += [(needed, self._library_file(needed)) for needed in Elf(data, name).needed()]

    def extension(self, part: str, source: Path, target: str) -> None:
        """A Python extension module, without libraries that it was linked with for nothing."""
        elf = Elf(self._taken(source), source.name)
        for name in elf.needed():
            if name.startswith("libstdc++") and name not in elf.versioned_libraries():
                # Loading the C++ library costs a tenth of a second under emulation, and more memory than the
                # extension itself; the C++ library versions every symbol, so none of its symbols is used.
                elf = Elf(elf.without_needed(name), source.name)
                self.notes.append(f"{source.name}: dropped its unused dependency on {name}")
        self.add(part, target, elf.data, 0o755)
        for name in elf.needed():
            self.library(name)

    def library(self, name: str) -> None:
        """A shared library by the name the loader looks for, and what it needs in turn."""
        target = f"{self._library_dir}/{name}"
        if target in self.tree:
            return
        data = self._taken(self._library_file(name).resolve())
        self.add("libraries", target, data, 0o755)
        for needed in Elf(data, name).needed():
            self.library(needed)

    def _library_file(self, name: str) -> Path:
        for directory in self._root.library_dirs():
            if (directory / name).is_file():
                return directory / name
        raise ImageError(f"none of the unpacked packages has the library {name}")

    def python(self, modules: ModuleSet, python_name: str) -> None:
        """Bytecode without sources: one bundle, and beside it what the interpreter needs before it can read it."""
        base = f"/usr/lib/{python_name}"
        index: dict[str | int, tuple[int, int, bool] | tuple[int, int] | str | int] = {}
        blob = bytearray()
        for number, group in enumerate(modules.groups):
            index[number] = (len(blob), len(group.code))
            index.update(dict.fromkeys(group.names, number))
            blob += group.code
        for module in modules.bytecode:
            self._taken(module.source)
            if module.name in EARLY_MODULES:
                path = module.name + ("/__init__.pyc" if module.is_package else ".pyc")
                # Flags and source stamp are zero: nothing is checked against a source when there is none.
                self.add(_part(module.name), f"{base}/{path}", modules.magic + bytes(12) + module.code)
                continue
            if module.name not in index:
                index[module.name] = (len(blob), len(module.code), module.is_package)
                blob += module.code
            part = _part(module.name)
            self.parts[part] = self.parts.get(part, 0) + len(module.code)
        for extension in modules.extensions:
            path = f"{base}/lib-dynload/{extension.name}.so"
            index[extension.name] = path
            self.extension(_part(extension.name), extension.path, path)
        raw_index = marshal.dumps(index, MARSHAL_VERSION)
        self.tree.file(BUNDLE, len(raw_index).to_bytes(8, "little") + raw_index + bytes(blob))
        # The interpreter takes the directory that has this file for its library; the module itself is inside it.
        self.add("Python library", f"{base}/os.pyc", b"")

    def kernel_modules(
        self,
        release: str,
        modules: Sequence[Module],
        builtin: frozenset[str],
        seldom: frozenset[str] = frozenset(),
    ) -> None:
        """Modules and the list the agent loads them by: "name file needed-module..." in an order that works.

        Those that are `seldom` loaded are compressed with zlib, which the guest's interpreter has built in.
        """
        lines = []
        for module in modules:
            path = f"/usr/lib/modules/{release}/{module.name}.ko"
            data = module.data
            if module.name in seldom:
                path, data = f"{path}.z", zlib.compress(data, 9)
            self.add("kernel modules", path, data)
            lines.append(" ".join((module.name, path, *module.needs)))
        self.add("kernel modules", f"{DATA_DIR}/modules", "".join(line + "\n" for line in lines).encode())
        self.add("kernel modules", f"{DATA_DIR}/modules.builtin", "\n".join(sorted(builtin)).encode())


def _merged(path: str) -> str:
    """/lib64/x is /usr/lib64/x in the image, whose /lib64 is a link."""
    return path if path.startswith("/usr/") else f"/usr{path}"


def _part(module: str) -> str:
    top = module.partition(".")[0]
    if top in AGENT_PACKAGES:
        return "agent"
    return "protobuf" if top == "google" else "Python library"

"""Which Python modules the guest needs, and their bytecode.

The guest's own interpreter answers both: it runs here out of the unpacked packages, imports the agent, and
tells what that brought in; and it compiles, so the bytecode is of the version that will read it. The image
holds bytecode only: without it the first start compiles everything, which under emulation takes seconds.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guest_image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guest_image.tools import Root

#: Every module of the first two goes into the image, of the others what they import.
AGENT_PACKAGES = ("guest_agent", "oci_engine", "ttrpc", "agent_proto", "netlink")
_HERE = Path(__file__).parent
INSIDE = _HERE / "inside"
"""Modules that exist in the guest only: the importer, and replacements for large modules of others."""
IMPORTER = "bundle"
#: What the agent imports together, in this order: before it listens, before it answers, for the first container.
GROUPS = (
    ("guest_agent.__main__", "guest_agent.init", "guest_agent.modules"),
    ("guest_agent.log", "guest_agent.server"),
    ("oci_engine.container", "oci_engine.making", "oci_engine.options", "oci_engine.cgroups.v2",
     "oci_engine.cgroups.device_program", "oci_engine.cgroups.device_rules"),
)  # fmt: skip
#: Found in the file system, because the interpreter needs them before the importer is in place.
EARLY_MODULES = frozenset({"encodings", IMPORTER})


@dataclass(frozen=True)
class Bytecode:
    """A compiled module, `code` being what `marshal` reads."""

    name: str
    source: Path
    is_package: bool
    code: bytes


@dataclass(frozen=True)
class Extension:
    """A module that is a shared library."""

    name: str
    path: Path


@dataclass(frozen=True)
class Group:
    """Modules that are imported together, `code` being what `marshal` reads."""

    names: tuple[str, ...]
    code: bytes


@dataclass(frozen=True)
class ModuleSet:
    bytecode: tuple[Bytecode, ...]
    extensions: tuple[Extension, ...]
    magic: bytes
    groups: tuple[Group, ...] = ()


class GuestPython:
    """The guest's interpreter, or one of the same version for this machine, run from an unpacked root."""

    def __init__(self, root: Root) -> None:
        self._root = root
        programs = sorted((root.path / "usr/bin").glob("python3.[0-9]*"))
        programs = [path for path in programs if re.fullmatch(r"python3\.\d+", path.name)]
        if len(programs) != 1:
            raise ImageError(f"expected one Python in the unpacked packages, found {len(programs)}")
        self.program = programs[0]
        self.name = self.program.name
        self.stdlib = root.path / "usr/lib" / self.name

    def _run(self, script: Sequence[str | Path], request: str, path: Sequence[Path]) -> dict[str, object]:
        env = {
            "PYTHONHOME": str(self._root.path / "usr"),
            "PYTHONPATH": ":".join(str(directory) for directory in path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # Without debug ranges: columns in tracebacks are not worth a fifth of the bytecode.
        flags = ("-S", "-P", "-s", "-X", "no_debug_ranges")
        said = self._root.run(self.program, *flags, *script, env=env, data=request.encode())
        answer = json.loads(said)
        if not isinstance(answer, dict):
            raise ImageError(f"{self.name} answered {type(answer).__name__} when asked about its modules")
        return answer

    def version(self) -> str:
        return str(self._run(["-c", _ASK_VERSION], "", [])["version"])

    def collect(self, entries: Iterable[str], path: Sequence[Path]) -> ModuleSet:
        """Import `entries` with `path` in front of the standard library, and compile all that came with them.

        Modules of `INSIDE` take the place of those of the same name.

        Raises ToolFailed with the import error when an entry needs something that is not there.
        """
        request = "\n".join([str(INSIDE), IMPORTER, *map(" ".join, GROUPS), *entries])
        answer = self._run([_HERE / "collect.py"], request, path)
        modules, groups = answer["modules"], answer["groups"]
        assert isinstance(modules, list)
        assert isinstance(groups, list)
        bytecode = [
            Bytecode(
                module["name"], Path(module["origin"]), module["package"], base64.b64decode(module["code"])
            )
            for module in modules
            if module["code"] is not None
        ]
        extensions = [
            Extension(module["name"], Path(module["origin"])) for module in modules if module["code"] is None
        ]
        return ModuleSet(
            tuple(bytecode),
            tuple(extensions),
            base64.b64decode(str(answer["magic"])),
            tuple(Group(tuple(group["names"]), base64.b64decode(group["code"])) for group in groups),
        )


def modules_of(package: str, directory: Path) -> list[str]:
    """Names of a package's modules, its `__main__` too."""
    names = []
    for path in sorted((directory / package).rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


_ASK_VERSION = "import json, sys; print(json.dumps({'version': sys.version.split()[0]}))"

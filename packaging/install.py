"""Installs kata-py from a source checkout, and removes exactly that again.

    python3 packaging/install.py install   --prefix /usr/local [--destdir STAGE]
    python3 packaging/install.py uninstall --prefix /usr/local [--destdir STAGE]

Run by the distribution's interpreter and therefore limited to the standard library. What is installed:

    PREFIX/lib/kata-py            our packages with their dependencies, private: no other program imports
    from here PREFIX/bin                    the shim under both its names, the command line tool, and runk
    /usr/share/kata-py            the guest, where the built-in configuration looks for it
    /usr/share/defaults/kata-py   the configuration as it was delivered /etc/kata-py                  the
    configuration to edit; an edited one is never replaced or removed

A record of files, folders and the configuration's digest is kept in PREFIX/lib/kata-py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import launcher
import python_env

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = python_env.ROOT
CONFIGURATION = ROOT / "config" / "defaults" / "configuration-qemu.toml"
# Of confidential guests: to be copied from where they are delivered.
MORE_CONFIGURATIONS = sorted(CONFIGURATION.parent.glob("configuration-qemu-*.toml"))
GUEST = ROOT / "build" / "guest"
GUEST_FILES = ("vmlinux", "initrd.img", "manifest.json")
RECORD = "installed.json"


@dataclass(frozen=True)
class Places:
    """Where things go. With a `destdir` they are put below it, but refer to each other as if it were not there."""

    prefix: Path
    destdir: Path = Path("/")

    @property
    def lib(self) -> Path:
        return self.prefix / "lib" / "kata-py"

    @property
    def bin(self) -> Path:
        return self.prefix / "bin"

    guest = Path("/usr/share/kata-py")
    defaults = Path("/usr/share/defaults/kata-py/configuration.toml")
    etc = Path("/etc/kata-py/configuration.toml")
    # Nobody installs anything here: the shim keeps what it can find out again.
    cache = Path("/var/cache/kata-py")

    def staged(self, path: Path) -> Path:
        """Where a file that will be at `path` is written now."""
        return self.destdir / path.relative_to("/")


@dataclass
class Record:
    """What an installation consists of, as paths without the stage. `folders` are those that it created."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    configuration_sha256: str = ""

    @classmethod
    def read(cls, places: Places) -> Record | None:
        try:
            return cls(**json.loads((places.staged(places.lib) / RECORD).read_text()))
        except FileNotFoundError:
            return None


class Installation:
    """One run of the installer; remembers what it made."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._before = Record.read(places)
        # Folders of an earlier installation are still ours, although they exist already.
        self.record = Record(folders=list(self._before.folders) if self._before else [])

    def folder(self, path: Path) -> None:
        """Creates a folder with its parents."""
        staged = self._places.staged(path)
        missing = [path, *path.parents]
        for each in reversed([each for each in missing if not self._places.staged(each).exists()]):
            if str(each) not in self.record.folders:
                self.record.folders.append(str(each))
        staged.mkdir(parents=True, exist_ok=True)

    def file(self, source: Path, path: Path) -> None:
        """Copies a file into place; whoever reads the old one at the moment keeps it."""
        self.folder(path.parent)
        staged = self._places.staged(path)
        fresh = staged.with_name(f".{staged.name}.new")
        shutil.copyfile(source, fresh)
        fresh.chmod(0o644)
        fresh.replace(staged)
        self.record.files.append(str(path))

    def library(self, add_dependencies: Callable[[Path], None]) -> None:
        """Puts together the private library beside its place and then exchanges it as a whole.

        A container that starts at this moment finds the old one or the new one, never a part of either.
        """
        lib = self._places.lib
        self.folder(lib.parent)
        staged = self._places.staged(lib)
        fresh, old = staged.with_name("kata-py.new"), staged.with_name("kata-py.old")
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir()
        add_dependencies(fresh)
        for name in python_env.PACKAGES:
            shutil.copytree(ROOT / name, fresh / name, ignore=shutil.ignore_patterns("__pycache__"))
        write_metadata(fresh)
        (fresh / "REVISION").write_text(revision(ROOT))  # for the shim's -info
        subprocess.run(
            # The byte code names the place that the files will have, which is what tracebacks show.
            [sys.executable, "-m", "compileall", "-q", "-s", fresh, "-p", lib, fresh],
            check=True,
        )
        if staged.exists():
            staged.rename(old)
        fresh.rename(staged)
        shutil.rmtree(old, ignore_errors=True)

    def programs(self) -> None:
        """The launchers, for this version of Python: the dependencies contain code for no other."""
        python = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
        self.folder(self._places.bin)
        staged = self._places.staged(self._places.bin)
        made = launcher.write_all(staged, python=python, folders=[self._places.lib])
        self.record.files += [str(self._places.bin / path.name) for path in made]

    def configuration(self) -> str:
        """Installs both copies; returns a line for the user when the edited one was left as it is."""
        self.file(CONFIGURATION, self._places.defaults)
        for source in MORE_CONFIGURATIONS:
            self.file(source, self._places.defaults.with_name(source.name))
        self.record.configuration_sha256 = digest(CONFIGURATION)
        etc = self._places.staged(self._places.etc)
        known = self._before.configuration_sha256 if self._before else ""
        if etc.exists() and digest(etc) not in (known, self.record.configuration_sha256):
            return f"{self._places.etc} has been edited and stays; the new one is {self._places.defaults}"
        self.file(CONFIGURATION, self._places.etc)
        # Not removed without a look at it.
        self.record.files.remove(str(self._places.etc))
        return ""

    def finish(self) -> None:
        """Writes the record."""
        path = self._places.staged(self._places.lib) / RECORD
        path.write_text(json.dumps(asdict(self.record), indent=1) + "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_metadata(library: Path) -> None:
    """What `importlib.metadata` needs to tell our version."""
    version = python_env.project_table()["version"]
    folder = library / f"kata_py-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kata-py\nVersion: {version}\n")


def revision(checkout: Path) -> str:
    """The commit of a checkout, with "-dirty" when files differ from it; empty when there is no git to ask."""
    argv = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def install_dependencies(library: Path) -> None:
    """pip's part of the library. The scripts of those packages are of no use without their environment."""
    pip: list[str | Path] = [
        ROOT / ".venv" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
    ]
    wanted = python_env.requirements(ROOT / "pyproject.toml", dev=False)
    subprocess.run([*pip, "--target", library, *wanted], check=True)
    shutil.rmtree(library / "bin", ignore_errors=True)


def install(places: Places, *, guest: Path, add_dependencies: Callable[[Path], None]) -> list[str]:
    """Installs everything; returns lines for the user. An earlier installation in the same places is replaced."""
    installation = Installation(places)
    installation.library(add_dependencies)
    installation.programs()
    for name in GUEST_FILES:
        installation.file(guest / name, places.guest / name)
    kept = installation.configuration()
    installation.finish()
    lines = [
        f"installed {places.bin / launcher.SHIM_NAMES[0]} and {places.bin / launcher.TOOL_NAME} with their guest",
        f"installed {places.bin / launcher.RUNTIME_NAME}",
    ]
    return [*lines, kept] if kept else lines


def uninstall(places: Places) -> list[str]:
    """Removes what the record lists, and what was cached since; returns lines for the user."""
    record = Record.read(places)
    if record is None:
        return [f"nothing is installed in {places.prefix}"]
    lines = []
    for name in record.files:
        places.staged(Path(name)).unlink(missing_ok=True)
    etc = places.staged(places.etc)
    if etc.exists() and digest(etc) != record.configuration_sha256:
        lines.append(f"{places.etc} has been edited and stays")
    else:
        etc.unlink(missing_ok=True)
    shutil.rmtree(places.staged(places.lib))
    shutil.rmtree(places.staged(places.cache), ignore_errors=True)
    remove_empty(places.staged(Path(name)) for name in record.folders)
    return [*lines, f"removed kata-py from {places.prefix}"]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders that hold nothing any more, deepest first."""
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # gone already, or something else is in it: both are fine
            folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description="Install kata-py from this checkout, or remove it.")
    parser.add_argument("verb", choices=("install", "uninstall"))
    parser.add_argument("--prefix", type=Path, default=Path("/usr/local"))
    parser.add_argument("--destdir", default="", help="put everything below this folder, for packages")
    options = parser.parse_args()
    if not options.prefix.is_absolute():
        sys.exit(f"{options.verb}: PREFIX has to be an absolute path, not {options.prefix}")
    places = Places(options.prefix, Path(options.destdir).absolute() if options.destdir else Path("/"))
    try:
        if options.verb == "install":
            lines = install(places, guest=GUEST, add_dependencies=install_dependencies)
        else:
            lines = uninstall(places)
    except PermissionError as error:
        sys.exit(
            f"{options.verb}: {error.filename}: not allowed; run it as root, or with DESTDIR and PREFIX of yours"
        )
    except (OSError, subprocess.CalledProcessError, launcher.LauncherError) as error:
        sys.exit(f"{options.verb}: {error}")
    print("\n".join(f"{options.verb}: {line}" for line in lines))


if __name__ == "__main__":
    main()

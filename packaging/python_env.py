"""Makes the virtual environment of a source checkout, with the dependencies that pyproject.toml names.

Run by the distribution's own interpreter and therefore limited to the standard library::

    /usr/bin/python3 packaging/python_env.py .venv [--dev]

pip only runs when the dependencies or the interpreter changed since the last time, so repeating it is cheap.
The checkout and its packaging/ scripts, which have tests, are put on the environment's path by a `.pth` file
instead of an editable installation: nothing has to be built, and what is imported are the very files of the
checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "netlink",
    "oci_engine",
    "ttrpc",
    "config",
    "agent_proto",
    "hypervisor",
    "shim",
    "guest_agent",
    "guest_image",
    "cli",
    "runk",
)


def project_table(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, Any]:
    """The `[project]` table."""
    table: dict[str, Any] = tomllib.loads(pyproject.read_text())["project"]
    return table


def requirements(pyproject: Path, *, dev: bool) -> list[str]:
    """The requirement strings of the project, with those of the `dev` extra if wanted."""
    project = project_table(pyproject)
    wanted = list(project["dependencies"])
    if dev:
        wanted += project["optional-dependencies"]["dev"]
    return wanted


def fingerprint(wanted: list[str]) -> str:
    """Changes exactly when another set of requirements or another interpreter would be installed."""
    return hashlib.sha256(json.dumps([sys.version, sorted(wanted)]).encode()).hexdigest()


def site_packages(folder: Path) -> Path:
    """Where the environment made by this very interpreter keeps its packages."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def usable(folder: Path) -> bool:
    """Whether the environment exists and belongs to this version of Python."""
    return (folder / "bin" / "python").exists() and (site_packages(folder) / "pip").is_dir()


def ensure_packages(folder: Path, *, dev: bool) -> None:
    """Runs pip if the stamp of the last time does not match; raises CalledProcessError when pip fails."""
    wanted = requirements(ROOT / "pyproject.toml", dev=dev)
    stamp = folder / (".kata-py-dev" if dev else ".kata-py-run")
    mark = fingerprint(wanted)
    if not (stamp.exists() and stamp.read_text() == mark):
        started = time.monotonic()
        print(f"setup: installing {len(wanted)} Python packages and what they need into {folder}", flush=True)
        subprocess.run(
            [
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-warn-script-location",
                *wanted,
            ],
            check=True,
        )
        stamp.write_text(mark)
        print(f"setup: Python packages installed in {time.monotonic() - started:.0f} s", flush=True)


def compile_sources(python: Path) -> None:
    """Writes the byte code of our packages now, whatever PYTHONDONTWRITEBYTECODE says.

    Without it every start of the shim would compile all it imports.
    """
    folders = [ROOT / name for name in PACKAGES if (ROOT / name).is_dir()]
    subprocess.run([python, "-m", "compileall", "-q", *folders], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or refresh the virtual environment of this checkout.")
    parser.add_argument("folder", type=Path, help="the environment's folder, usually .venv")
    parser.add_argument("--dev", action="store_true", help="also install what checking and testing need")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    # pip skips byte code when this is set, and then each start of a program would compile its imports.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not usable(folder):
        print(f"setup: making {folder} with {sys.executable}", flush=True)
        venv.EnvBuilder(symlinks=True, with_pip=True, clear=folder.exists()).create(folder)
    ensure_packages(folder, dev=options.dev)
    (site_packages(folder) / "kata_py_checkout.pth").write_text(f"{ROOT}\n{ROOT / 'packaging'}\n")
    compile_sources(folder / "bin" / "python")


if __name__ == "__main__":
    main()

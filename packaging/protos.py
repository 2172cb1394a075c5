#!/usr/bin/env python3
"""Write the generated protobuf modules from our .proto files, or check that they are fresh.

    python packaging/protos.py            rewrite every *_pb2.py and *_pb2.pyi
    python packaging/protos.py --check    change nothing; exit 1 and name the files that differ

The generated files are committed, so building and installing need no protobuf compiler. Files are compiled
from the repository root: a .proto registers in the process-wide descriptor pool under its full path, which
no other package uses. The output depends on the generators' versions; pyproject.toml pins them in the `dev`
extra.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Tree:
    """One folder of .proto files and where its modules go, both relative to the repository.

    `stubs` is the protoc output that writes the .pyi files. `mypy` (mypy-protobuf) checks field names given
    to HasField, carries our comments over as docstrings, and copes with fields named like their own type,
    which the OCI messages are full of; `pyi` is protoc's own and needs no plug-in.
    """

    protos: str
    gen: str
    stubs: str

    def sources(self) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / self.protos).glob("*.proto"))

    def generated(self) -> list[str]:
        """The generated files that are on disk now, repository-relative."""
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / self.gen).glob("*_pb2.py*"))


TREES = (
    Tree(protos="agent_proto/protos", gen="agent_proto/gen", stubs="mypy"),
    Tree(protos="shim/api/protos", gen="shim/api/gen", stubs="mypy"),
    Tree(protos="ttrpc/proto", gen="ttrpc/proto", stubs="mypy"),
    Tree(protos="tests/integration/cri/protos", gen="tests/integration/cri/gen", stubs="mypy"),
)


def protoc(tree: Tree, out: Path) -> None:
    """Compile one tree into `out`; the compiler's own messages go to stderr. Raises CalledProcessError."""
    argv = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={out}"]
    if tree.stubs == "mypy":
        argv += [f"--plugin=protoc-gen-mypy={mypy_plugin()}", f"--mypy_out=quiet:{out}"]
    else:
        argv += [f"--{tree.stubs}_out={out}"]
    subprocess.run([*argv, *tree.sources()], cwd=ROOT, check=True)


def mypy_plugin() -> str:
    """The plug-in that belongs to this interpreter, also when its environment is not activated."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("protoc-gen-mypy", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        sys.exit("protoc-gen-mypy not found; install the development extra: pip install -e .[dev]")
    return found


def generate(tree: Tree) -> dict[str, str]:
    """The fresh content of every generated file of a tree, by repository-relative path."""
    if not tree.sources():
        return {}
    with tempfile.TemporaryDirectory(prefix="protos-") as name:
        protoc(tree, Path(name))
        made = sorted((Path(name) / tree.protos).glob("*_pb2.py*"))
        return {f"{tree.gen}/{path.name}": moved(path.read_text(), tree) for path in made}


def moved(text: str, tree: Tree) -> str:
    """Imports and module names follow the file to `gen`; the .proto's path in the descriptor stays."""
    return text.replace(tree.protos.replace("/", "."), tree.gen.replace("/", "."))


def stale(fresh: dict[str, str], tree: Tree) -> list[str]:
    """Files that are missing, different, or left behind by a .proto that is gone."""
    on_disk = {name: (ROOT / name).read_text() for name in tree.generated()}
    return sorted(name for name in fresh.keys() | on_disk.keys() if fresh.get(name) != on_disk.get(name))


def rewrite(names: list[str], fresh: dict[str, str]) -> None:
    for name in names:
        path = ROOT / name
        if name in fresh:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fresh[name])
        else:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Write or check the generated protobuf modules.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a file is not fresh")
    args = parser.parse_args()

    differing = []
    for tree in TREES:
        fresh = generate(tree)
        names = stale(fresh, tree)
        if not args.check:
            rewrite(names, fresh)
        differing += names
    if args.check and differing:
        tools = ", ".join(f"{name} {version(name)}" for name in ("grpcio-tools", "mypy-protobuf"))
        print(
            f"stale: {' '.join(differing)}; run python packaging/protos.py (checked with {tools})",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

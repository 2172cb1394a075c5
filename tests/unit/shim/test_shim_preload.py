"""A daemon imports nothing of ours, or of our dependencies, once it is up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("netlink", "ttrpc", "config", "agent_proto", "hypervisor", "shim")
# The short-lived actions of the program and the way to the daemon: never run in it, or before anything else.
NOT_THE_DAEMON = {"shim/cli.py", "shim/start.py", "shim/delete.py", "shim/__main__.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
import shim.serve, shim.boot, shim.daemon, shim.preload
shim.preload.load()
print("\\n".join(sys.modules))
"""
UNTIL_QEMU = """
import sys
sys.path.insert(0, sys.argv[1])
import shim.serve, shim.boot
print("\\n".join(sys.modules))
"""
SHORT_LIVED = """
import sys
sys.path.insert(0, sys.argv[1])
import shim.cli, shim.start, shim.delete, shim.cleanup, shim.info
print("\\n".join(sys.modules))
"""
HEAVY = (
    "asyncio", "ctypes", "dataclasses", "google.protobuf", "grpc", "inspect", "msgspec", "pathlib", "structlog",
    "subprocess", "tomllib", "typing", "yaml",
)  # fmt: skip


def late_imports(source: str) -> set[str]:
    """Modules that the functions of a module import, without the standard library's."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, FUNCTIONS):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                    # A package's classes have capitals; the rest are its modules.
                    names = [alias.name for alias in node.names]
                    found |= {f"{node.module}.{name}" if name.islower() else node.module for name in names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module)
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def test_every_late_import_is_preloaded() -> None:
    late: dict[str, str] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            place = str(path.relative_to(ROOT))
            if place not in NOT_THE_DAEMON:
                late |= dict.fromkeys(late_imports(path.read_text()), place)
    assert {"shim.agent", "shim.api.gen.runc_options_pb2"} <= set(late)
    command = [sys.executable, "-c", LOADED, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name: place for name, place in late.items() if name not in loaded} == {}


def test_qemu_does_not_wait_for_what_is_needed_later() -> None:
    command = [sys.executable, "-c", UNTIL_QEMU, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    later = {"agent_proto", "google.protobuf", "qemu.qmp", "rich", "ttrpc", "yaml"}
    assert later.isdisjoint(loaded)
    assert {"structlog", "hypervisor.qemu.machine"} <= set(loaded)


def test_short_lived_actions_load_little() -> None:
    """Each of these would be a good part of the time that containerd waits for them."""
    command = [sys.executable, "-c", SHORT_LIVED, str(ROOT)]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert {"shim.start", "shim.cleanup", "shim.info"} <= loaded
    assert {name for name in HEAVY if name in loaded} == set()


def test_late_imports_are_found_wherever_they_are() -> None:
    source = """
import json, a.top
def one():
    from shim import inner
    class Two:
        async def three(self):
            import b.late, os
            from c.d import e
"""
    assert late_imports(source) == {"shim.inner", "b.late", "c.d"}

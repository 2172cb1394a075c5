"""QEMU's whole argument list for typical specifications, compared with reviewed files.

A case is `tests/golden/qemu/<arch>/<case>.toml` (fields of `VmSpec`, plus a table `fds`) and `<case>.args`, one
option per line. `GOLDEN_REWRITE=1 pytest tests/unit/hypervisor/test_golden.py` writes the second from the first.
"""

from __future__ import annotations

import os
import tomllib
from base64 import b64encode
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hypervisor.extension import Extension
from hypervisor.protection import Protection, SecureExecution, Snp, Tdx
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.qemu.nic import NicFds
from hypervisor.spec import Export, Nic, NumaNode, QmpTimeouts, Share, VmSpec
from hypervisor.verity import Verity
from hypervisor.vfio import HostDevice

GOLDEN = Path(__file__).parents[2] / "golden" / "qemu"
CASES = sorted(GOLDEN.glob("*/*.toml"))
PATHS = {
    *("run_dir", "qemu_path", "kernel", "initrd", "image", "firmware", "netns", "directory", "daemon"),
    *("memory_dir", "pflash", "image_initrd", "initdata", "entropy_source", "dump_dir", "own_file"),
    "vhost_user",
}


def typed(table: dict[str, Any]) -> dict[str, Any]:
    def value(key: str, raw: Any) -> Any:
        if key in PATHS and not isinstance(raw, int):  # the descriptor of a file has its name
            return tuple(map(Path, raw)) if isinstance(raw, list) else Path(raw)
        return tuple(raw) if isinstance(raw, list) else raw

    return {key: value(key, raw) for key, raw in table.items()}


def protection(table: dict[str, Any]) -> Protection:
    """From a table with the kind, the fields, `measured` in hexadecimal, and of what is too long to read its size."""
    kind = {"tdx": Tdx, "snp": Snp, "se": SecureExecution}[table.pop("kind")]
    if "measured" in table:
        table["measured"] = bytes.fromhex(table["measured"])
    if isinstance(table.get("quote_socket"), str):
        table["quote_socket"] = Path(table["quote_socket"])
    for name in ("id_block", "id_auth"):
        if size := table.pop(f"{name}_bytes", None):
            table[name] = b64encode(bytes(size)).decode()
    made: Protection = kind(**table)
    return made


def read_case(path: Path) -> tuple[VmSpec, Fds]:
    table = tomllib.loads(path.read_text())
    numbers = table.pop("fds")
    nic_fds = tuple(NicFds(**typed(nic)) for nic in numbers.pop("nics", []))
    files = tuple(fd if fd >= 0 else None for fd in numbers.pop("host_devices", []))
    fds = Fds(**typed(numbers), nics=nic_fds, host_devices=files)
    shares = tuple(Share(**typed(share)) for share in table.pop("shares", []))
    exports = tuple(Export(**typed(export)) for export in table.pop("exports", []))
    numa = tuple(NumaNode(**typed(node)) for node in table.pop("numa", []))
    nics = tuple(Nic(**typed(nic)) for nic in table.pop("nics", []))
    verity = Verity(**table.pop("verity")) if "verity" in table else None
    protected = protection(table.pop("protection")) if "protection" in table else None
    host_devices = tuple(HostDevice(**typed(device)) for device in table.pop("host_devices", []))
    extensions = tuple(Extension(**typed(extension)) for extension in table.pop("extensions", []))
    parts: dict[str, Any] = {
        "extensions": extensions, "host_devices": host_devices, "exports": exports, "nics": nics, "numa": numa,
        "arch": path.parent.name, "shares": shares, "verity": verity, "protection": protected,
    }  # fmt: skip
    return VmSpec(**typed(table), **parts), fds


def one_option_per_line(argv: list[str]) -> str:
    lines = argv[:1]
    for word in argv[1:]:
        if word.startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_argv_is_as_reviewed(case: Path) -> None:
    spec, fds = read_case(case)
    text = one_option_per_line(build_cmdline(spec, fds))
    golden = case.with_suffix(".args")
    if os.environ.get("GOLDEN_REWRITE"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_field_of_the_specification_is_in_some_case() -> None:
    """A new field without a golden case is a field nobody has seen on the command line."""
    never_on_it = {"vhost_user_reconnect_s", "arch", "run_dir", "netns", "qmp", "user", "selinux_label"}
    never_on_it |= {"disk_logical_sector_bytes", "disk_physical_sector_bytes"}  # of what is plugged in later
    seen = {key for case in CASES for key in tomllib.loads(case.read_text())}
    assert {field.name for field in fields(VmSpec)} - never_on_it <= seen


def test_defaults_of_the_handshake() -> None:
    assert QmpTimeouts() == QmpTimeouts(read_timeout_s=0.25, connect_timeout_s=5.0, retry_pause_s=0.05)

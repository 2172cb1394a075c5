"""A guest whose kernel panics while containers run in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.containerd import Containerd

pytestmark = [pytest.mark.one_version, pytest.mark.usefixtures("restored_configuration")]


def test_its_memory_is_saved_and_its_processes_end(containerd: Containerd, tmp_path: Path) -> None:
    """QEMU is not root's here, and the directory is root's alone."""
    # Little memory: all of it is written to the disk.
    lines = f'guest_memory_dump_path = "{tmp_path}/crash"\nrootless = true\ndefault_memory = 256'
    text = containerd.config.read_text()
    containerd.config.write_text(text.replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{lines}"))
    container = containerd.start("sleep", "1000", options=["--privileged"])
    try:
        done = containerd.exec(container, "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000")
    finally:
        containerd.remove(container)
    assert done.returncode == 255
    core, state = sorted((tmp_path / "crash" / container).iterdir())
    assert (core.suffix, state.suffix) == (".elf", ".json")
    assert b"Kernel panic - not syncing: sysrq triggered crash" in state.read_bytes()
    assert b"Linux version " in core.read_bytes()

"""A real QEMU as a user of its own: it does all that root's does, and nothing more is open to it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor.errors import HostUnsupported
from hypervisor.qemu.machine import booted
from hypervisor.rootless import FIRST_ID, choose_user
from tests.vm.test_machine import (
    console_says,
    make_spec,
    needs_virtiofsd,
    share,
    tiny_kernel,
)
from tests.vm.test_machine import (
    pytestmark as vm_marks,
)
from tests.vm.test_machine_panic import PANIC, ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor.spec import VmSpec

__all__ = ["make_spec"]

pytestmark = [*vm_marks, pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as others")]
FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@pytest.fixture
def rootless(make_spec: Callable[..., VmSpec], tmp_path: Path) -> Callable[..., VmSpec]:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)  # pytest's own folders are closed

    def make(code: bytes | None = None, **fields: object) -> VmSpec:
        spec = make_spec(code, seccomp_sandbox=FILTER, **fields)
        return replace(spec, user=choose_user("test", spec.accel))

    return make


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@needs_virtiofsd
async def test_who_qemu_is(rootless: Callable[..., VmSpec], tmp_path: Path) -> None:
    spec = rootless(vsock="user", shares=(share(tmp_path),))
    assert spec.user is not None
    async with booted(spec) as machine:
        await console_says(machine.console_tail, "hello from the guest")
        of_qemu = status(machine.pid)
        assert of_qemu["Uid"].split() == of_qemu["Gid"].split() == [str(spec.user.uid)] * 4
        assert spec.user.uid >= FIRST_ID
        assert of_qemu["Groups"] == ""
        assert {of_qemu[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (of_qemu["NoNewPrivs"], of_qemu["Seccomp"]) == ("1", "2")
        assert status(machine.pids["virtiofsd"])["Uid"].split() == ["0"] * 4
        # As long as it runs, another sandbox of the same id would get another user.
        assert choose_user("test", spec.accel).uid == spec.user.uid + 1
        await machine.pause()
        await machine.resume()
    assert not Path(f"/proc/{machine.pid}").exists()
    assert os.listdir(tmp_path / "run") == ["console.log"]
    assert choose_user("test", spec.accel) == spec.user


async def test_its_guest_has_initial_data(rootless: Callable[..., VmSpec], tmp_path: Path) -> None:
    """From a file that QEMU could not open itself."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "initdata.image").write_bytes(bytes(512))
    async with booted(rootless(initdata=closed / "initdata.image")) as machine:
        await console_says(machine.console_tail, "hello from the guest")


async def test_its_guests_memory_is_saved(rootless: Callable[..., VmSpec], tmp_path: Path) -> None:
    """QEMU could not even reach the folder: it is root's alone."""
    (tmp_path / "closed").mkdir(mode=0o700)
    _, logs, _ = await ended(
        rootless(tiny_kernel(b"I give up\n", PANIC), dump_dir=tmp_path / "closed" / "s1")
    )
    assert logs == ["machine_started", "guest_panicked", "guest_memory_saved"]


async def test_a_kernel_that_it_cannot_read_is_told_before_the_start(
    rootless: Callable[..., VmSpec], tmp_path: Path
) -> None:
    (tmp_path / "hello").chmod(0o600)
    with pytest.raises(
        HostUnsupported, match=f"QEMU cannot read {tmp_path}/hello as another user than root; open it"
    ):
        async with booted(rootless()):
            pass
    assert not (tmp_path / "run").exists()

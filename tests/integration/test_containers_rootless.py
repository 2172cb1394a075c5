"""Containers in a machine whose QEMU is not root's: they notice nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd

pytestmark = [pytest.mark.one_version, pytest.mark.usefixtures("restored_configuration")]
FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def configure(containerd: Containerd, *lines: str) -> None:
    text = containerd.config.read_text()
    containerd.config.write_text(text.replace("[hypervisor.qemu]", "\n".join(["[hypervisor.qemu]", *lines])))


def test_a_container_runs_and_writes_to_a_volume(containerd: Containerd, tmp_path: Path) -> None:
    configure(containerd, "rootless = true", f'seccomp_sandbox = "{FILTER}"')
    tmp_path.chmod(0o700)  # QEMU itself does not get there: files are virtiofsd's
    mount = f"type=bind,src={tmp_path},dst=/volume,options=rbind:rw"
    container = containerd.start(
        "sh", "-c", "echo from inside > /volume/file; sleep 1000", options=["--mount", mount]
    )
    try:
        done = containerd.exec(
            container, "sh", "-c", "id -u; echo more >> /volume/file; touch /made; ls /made"
        )
        assert (done.returncode, done.stdout) == (0, "0\n/made\n")
        (pid,) = (
            line.split()[1]
            for line in containerd.checked("tasks", "ls").splitlines()
            if line.split()[0] == container
        )
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert int(status["Uid"][0]) >= 0x70000000
        assert set(status["Uid"]) == set(status["Gid"])
        assert (status["CapEff"], status["Seccomp"]) == (["0" * 16], ["2"])
    finally:
        containerd.remove(container)
    assert (tmp_path / "file").read_text() == "from inside\nmore\n"
    assert (tmp_path / "file").owner() == "root"


def test_a_label_on_a_host_without_selinux_is_refused(containerd: Containerd) -> None:
    if Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("this host has SELinux")
    configure(containerd, 'selinux_label = "system_u:system_r:container_kvm_t:s0"')
    done = containerd.run("true", options=[], container=(name := containerd.new_id()))
    containerd.ctr("containers", "rm", name)
    assert done.returncode != 0
    assert "this host has no SELinux; remove selinux_label or set disable_selinux" in done.stderr
    configure(containerd, "disable_selinux = true")
    assert containerd.run("true").returncode == 0

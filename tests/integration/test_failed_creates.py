"""Creates that cannot succeed, one after the other on one containerd: one line each, and nothing is left of any."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.integration.containerd import HostState, leftovers

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd


class Fault(NamedTuple):
    """What is wrong (keys of the configuration, options of `ctr run`, the command) and what the user reads."""

    words: str
    keys: str = ""
    options: tuple[str, ...] = ()
    command: str = "true"


_POD = ("--annotation", "io.kubernetes.cri.container-type=container")
FAULTS = {
    "virtiofsd": Fault("/nowhere/virtiofsd", keys='virtio_fs_daemon = "/nowhere/virtiofsd"'),
    "machine": Fault("nonsense", keys='machine_accelerators = "nonsense=on"'),
    "CPU": Fault("nonsense", keys='cpu_features = "nonsense=on"'),
    "accelerator": Fault("warp", keys='accel = "warp"'),
    "kernel": Fault("agent", keys='kernel_params = "rdinit=/nowhere panic=-1"'),
    "volume": Fault("/no/source", options=("--mount", "type=bind,src=/no/source,dst=/d,options=rbind:rw")),
    "file system": Fault("No such device", options=("--mount", "type=nosuchfs,src=x,dst=/d,options=rw")),
    "command": Fault("/no/such/program", command="/no/such/program"),
    "directory of the command": Fault("/etc/passwd", options=("--cwd", "/etc/passwd")),
    "pod": Fault("nobody", options=(*_POD, "--annotation", "io.kubernetes.cri.sandbox-id=nobody")),
}


@pytest.mark.one_version
@pytest.mark.usefixtures("restored_configuration")
def test_ten_failed_creates(containerd: Containerd, host_state: HostState) -> None:
    configuration = containerd.config.read_text()
    problems = []
    for name, fault in FAULTS.items():
        containerd.config.write_text(
            configuration.replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{fault.keys}")
        )
        container = containerd.new_id()
        done = containerd.run(fault.command, options=fault.options, container=container)
        containerd.ctr("containers", "rm", container)
        lines = done.stderr.strip().splitlines()
        if done.returncode == 0 or len(lines) != 1 or fault.words not in lines[0]:
            problems.append(f"{name}: status {done.returncode}: {done.stderr}")
        problems += [f"{name}: left {line}" for line in leftovers(host_state, containerd)]
    assert not problems, "\n".join(problems)

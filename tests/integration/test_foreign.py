"""Containers of other architectures than the host's: each in an emulated machine of its own architecture.

The tests of the host's own architecture are run with them as they are. A machine takes its time to boot, so each is
asked for much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import foreign_image
import pytest

from tests.integration import containerd as support
from tests.integration import test_run, test_task, test_terminal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.containerd import Containerd

FOREIGN = support.REPOSITORY / "build" / "foreign"
MACHINE_TYPE = "io.katacontainers.config.hypervisor.machine_type"


class Architecture(NamedTuple):
    """Containerd's name of it, the kernel's, and QEMU's of the machine."""

    platform: str
    kernel: str
    machine_type: str


ARM64 = Architecture("arm64", "aarch64", "virt")
S390X = Architecture("s390x", "s390x", "s390-ccw-virtio")


@pytest.fixture(scope="module", params=[ARM64, S390X], ids=["arm64", "s390x"])
def arch(request: pytest.FixtureRequest) -> Architecture:
    found: Architecture = request.param
    return found


@pytest.fixture(scope="module")
def foreign(arch: Architecture, containerd: Containerd) -> Containerd:
    """The same containerd, with the image of another architecture."""
    archive = FOREIGN / arch.platform / "busybox.tar"
    assert archive.exists(), f"{archive} is missing: run packaging/setup.sh tests, and make foreign"
    containerd.checked("images", "import", "--no-unpack", "--all-platforms", str(archive))
    image = foreign_image.image(arch.platform).name
    return replace(containerd, image=image, platform=f"linux/{arch.platform}")


def replaced_machines(containerd: Containerd, offset: int) -> int:
    """How often the log, from the offset on, says that the machine was of another architecture than the image."""
    return containerd.server.log_since(offset).count("machine_replaced")


def test_the_image_chooses(foreign: Containerd) -> None:
    offset = foreign.server.log_size()
    test_run.test_exit_status_is_the_commands(foreign)
    assert replaced_machines(foreign, offset) == 1


@pytest.mark.usefixtures("restored_configuration")
def test_an_annotation_chooses(foreign: Containerd, arch: Architecture) -> None:
    foreign.config.write_text(foreign.config.read_text() + 'enable_annotations = ["machine_type"]\n')
    annotated = replace(foreign, run_options=("--annotation", f"{MACHINE_TYPE}={arch.machine_type}"))
    offset = foreign.server.log_size()
    test_run.test_environment_and_directory(annotated)
    assert replaced_machines(foreign, offset) == 0


@pytest.mark.usefixtures("restored_configuration")
def test_the_configuration_chooses_and_no_image_changes_that(
    foreign: Containerd, containerd: Containerd, arch: Architecture
) -> None:
    # The files that it names are of the other machine; the usual ones are taken instead.
    lines = foreign.config.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("kernel", "initrd"))]
    foreign.config.write_text("\n".join([*kept, f'machine_type = "{arch.machine_type}"', ""]))
    offset = foreign.server.log_size()
    test_run.test_stdin_of_the_init_process(foreign)
    assert replaced_machines(foreign, offset) == 0
    refused = containerd.run("true")
    assert refused.returncode != 0
    assert f"is for amd64, the machine of sandbox {containerd.ids[-1]} for {arch.platform}" in refused.stderr
    assert f"machine_type is set by {foreign.config}" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_volumes(foreign: Containerd, tmp_path: Path) -> None:
    test_run.test_bind_mounts_of_directory_and_file(foreign, tmp_path)


def test_one_that_runs(foreign: Containerd, arch: Architecture) -> None:
    """One machine for everything that a running container is asked for, and then its end by a signal. The filter of
    system calls that it has is one for the host's architecture."""
    script = "trap 'exit 3' TERM; touch /ready; while :; do sleep 1000 & wait; done"
    container = foreign.start("sh", "-c", script, options=["--seccomp"])
    try:
        assert foreign.exec(container, "uname", "-m").stdout == f"{arch.kernel}\n"
        test_task.test_exec_has_its_own_streams_status_and_stdin(foreign, container)
        test_task.test_exec_options_reach_the_process(foreign, container)
        test_task.test_exec_of_a_missing_program_fails_in_one_line(foreign, container)
        test_task.test_ps(foreign, container)
        test_task.test_metrics_are_the_guests(foreign, container)
        test_task.test_pause_and_resume(foreign, container)
        test_run.bytes_pass_both_ways(foreign, container, test_run.MIB)
        test_terminal.exec_with_a_terminal(foreign, container)
        test_task.test_signal_reaches_the_init_process(foreign, container)
    finally:
        foreign.remove(container)


def test_one_that_is_killed(foreign: Containerd) -> None:
    container = foreign.start("sleep", "1000")
    try:
        test_task.test_kill_ends_it_with_137(foreign, container)
    finally:
        foreign.remove(container)


@pytest.mark.usefixtures("restored_configuration")
def test_a_guest_that_is_not_installed(foreign: Containerd, arch: Architecture) -> None:
    foreign.config.write_text(foreign.config.read_text().replace(str(FOREIGN), "/nonexistent"))
    done = foreign.run("true")
    assert done.returncode != 0
    missing = f"/nonexistent/{arch.platform}/vmlinux does not exist"
    assert f"is for {arch.platform}, and there is no machine for that: {missing}" in done.stderr
    assert f"kata-py guest build --arch {arch.platform}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr

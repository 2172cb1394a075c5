"""A volume on a file system that does not answer: whoever wants it waits, and nobody else does."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import mounts
from tests.integration.test_oom import in_pod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.containerd import Containerd


@contextmanager
def hung_file_system(folder: Path) -> Iterator[Callable[[], None]]:
    """One whose server never says a word, until what is yielded is called: then it is gone."""
    server = [os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)]
    mounts.mount("hung", str(folder), "fuse", 0, f"fd={server[0]},rootmode=40000,user_id=0,group_id=0")

    def end() -> None:
        while server:
            os.close(server.pop())

    try:
        yield end
    finally:
        end()
        mounts.detach(str(folder))


def waiting_for_it() -> bool:
    """Whether a thread of a shim waits for the server of such a file system."""
    for path in Path("/proc").glob("[0-9]*/task/*/wchan"):
        try:
            if path.read_text().startswith(("request_wait_answer", "fuse_", "__fuse_")):
                return True
        except OSError:
            continue  # it has ended
    return False


@pytest.mark.one_version
def test_a_hung_volume_holds_up_only_who_wants_it(containerd: Containerd, tmp_path: Path) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("a file system that hangs is made with FUSE, and the host has no /dev/fuse")
    sandbox, wants = containerd.new_id("s"), containerd.new_id("w")
    containerd.checked(
        *containerd.run_arguments(
            sandbox, ["sleep", "1000"], options=["--detach", *in_pod("sandbox", sandbox)]
        )
    )
    with hung_file_system(tmp_path) as end:
        volume = f"type=bind,src={tmp_path}/volume,dst=/data,options=rbind:rw"
        arguments = containerd.run_arguments(
            wants, ["true"], options=["--rm", "--mount", volume, *in_pod("container", sandbox)]
        )
        with containerd.popen(*arguments) as ctr:
            while not waiting_for_it():
                assert ctr.poll() is None, ctr.communicate()
                time.sleep(0.02)
            assert containerd.exec(sandbox, "echo", "here").stdout == "here\n"
            assert "RUNNING" in containerd.checked("tasks", "ls")
            containerd.checked("tasks", "kill", "--signal", "KILL", sandbox)
            other = containerd.run("echo", "another")
            assert other.stdout == "another\n", other
            end()
            _, problem = ctr.communicate(timeout=120)
    assert ctr.returncode != 0
    # Its pod is gone by then, or it says so of the volume.
    assert b"Traceback" not in problem
    assert problem.strip()
    containerd.remove(sandbox)
    containerd.ctr("containers", "rm", wants)

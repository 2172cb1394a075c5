"""Out of memory in one container of two in one machine: told before its end, and the other one does not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.faults import Events

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.containerd import Containerd

KEY = "io.kubernetes.cri"
LIMIT_BYTES = 32 << 20


def in_pod(kind: str, sandbox: str) -> list[str]:
    """Options of `ctr run` by which containerd's CRI plugin would say what a container is."""
    return ["--annotation", f"{KEY}.container-type={kind}", "--annotation", f"{KEY}.sandbox-id={sandbox}"]


def test_oom_in_one_container_of_two(containerd: Containerd, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before\n")
    sandbox, hungry = containerd.new_id("s"), containerd.new_id("h")
    volume = f"type=bind,src={tmp_path},dst=/data,options=rbind:rw"
    containerd.checked(*containerd.run_arguments(
        sandbox, ["sleep", "1000"], options=["--detach", "--mount", volume, *in_pod("sandbox", sandbox)]
    ))  # fmt: skip
    with Events(containerd, hungry) as events:
        # The last line of it is kept, and there is only one.
        done = containerd.run(
            "tail",
            "/dev/zero",
            container=hungry,
            options=["--rm", "--memory-limit", str(LIMIT_BYTES), *in_pod("container", sandbox)],
        )
        told = events.to_the_end()
    assert done.returncode == 137
    topics = [topic for topic, _ in told]
    assert topics.count("/tasks/oom") == 1
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit")
    assert dict(told)["/tasks/exit"] == 137
    script = "cat /data/file && echo after > /data/file && ls / > /dev/null && cat /data/file"
    assert containerd.exec(sandbox, "sh", "-c", script).stdout == "before\nafter\n"
    containerd.remove(sandbox)

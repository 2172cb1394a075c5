"""Initial data in a guest: the disk is there, it says what was written, and nothing can be written to it."""

from __future__ import annotations

import gzip
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from config.initdata import parse
from tests.vm.guest import MARKS, Guest, running_guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import pytest

    from agent_proto.gen import oci_pb2

pytestmark = MARKS

TOML = b'version = "0.1.0"\nalgorithm = "sha384"\n\n[data]\n"policy.rego" = "package agent_policy"\n'
IMAGE = parse(b64encode(gzip.compress(TOML)).decode()).image()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    directory = tmp_path_factory.mktemp("guest")
    disk = directory / "initdata.image"
    disk.write_bytes(IMAGE)
    async with running_guest(directory, changed={"initdata": disk}) as running:
        # Else the agent loads the disk's driver when it gets round to it.
        driver = pb.KernelModule(name="virtio_blk")
        await running.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb1", kernel_modules=[driver]))
        yield running


async def with_the_disk(guest: Guest) -> Callable[[oci_pb2.Spec], None]:
    """A change of a container that gives it the guest's first disk."""
    code, numbers = await guest.result("cat", "/sys/block/vda/dev")
    assert code == 0
    major, minor = map(int, numbers.split(b":"))

    def change(spec: oci_pb2.Spec) -> None:
        spec.Linux.Devices.add(Path="/dev/vda", Type="b", Major=major, Minor=minor, FileMode=0o600)
        spec.Linux.Resources.Devices.add(Allow=True, Type="b", Major=major, Minor=minor, Access="rwm")

    return change


async def test_the_guest_reads_what_the_host_wrote(guest: Guest) -> None:
    change = await with_the_disk(guest)
    code, content = await guest.result("dd", "if=/dev/vda", "bs=512", change=change)
    assert (code, content) == (0, IMAGE)
    assert gzip.decompress(content[16 : 16 + int.from_bytes(content[8:16], "little")]) == TOML


async def test_nothing_can_be_written_to_it(guest: Guest) -> None:
    script = "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=512 count=1 2>&1"
    code, text = await guest.result("sh", "-c", script, change=await with_the_disk(guest))
    assert code != 0
    assert text.startswith(b"1\n")
    assert b"Operation not permitted" in text

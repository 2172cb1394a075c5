"""How what a container mounts reaches its guest: through the shared directory, as a disk, or out of the guest itself.

The entries of the specification are changed to what the guest's agent is to mount. What needs a guest that is up only
gets noted here: disks are plugged in by `shim.disks`, and copies of a kubelet's volumes are made by `shim.mirror`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shim import disk_needs, oci
from shim.share import GUEST_SHM

if TYPE_CHECKING:
    from contextlib import ExitStack

    from agent_proto.gen import agent_pb2
    from agent_proto.gen.oci_pb2 import Mount as OciMount
    from agent_proto.gen.oci_pb2 import Spec as OciSpec
    from config import Config
    from shim.bundle import Bundle
    from shim.disk_needs import Needs
    from shim.share import SharedDir


class KubeletVolume(NamedTuple):
    """A directory whose content a kubelet changes: its path on the host, and the container's mount of it."""

    source: str
    mount: OciMount


class Volumes(NamedTuple):
    """Of a container's mounts, those that a kubelet changes, and what the guest has to mount beforehand."""

    kubelets: list[KubeletVolume]
    storages: list[agent_pb2.Storage]


def reach(
    spec: OciSpec,
    bundle: Bundle,
    needs: Needs,
    *,
    sandbox_id: str,
    share: SharedDir,
    config: Config,
    undo: ExitStack,
) -> Volumes:
    """Make what of the host the specification mounts reachable in the guest, and name it so; adds to `needs` what is a
    disk of the guest. `undo` is told how to take it back.

    Raises:
        InvalidRequest, NotSupported: a mount that cannot be.
        OSError: the kernel refused one.
    """
    volumes = Volumes([], [])
    devices = []
    for index, mount in enumerate(spec.Mounts):
        if oci.is_pods_shm(mount, (sandbox_id, bundle.container_id)):
            mount.type, mount.source = "bind", GUEST_SHM
            mount.options[:] = ["rbind"]
            continue
        # A relative source is relative to the bundle (runtime-spec config.md, "Mounts").
        source = str(bundle.path / mount.source)
        if need := disk_needs.volume_on_disk(
            mount, source, config.hypervisor, share.host_mounts, config.runtime.emptydir_mode
        ):
            needs.disks.append(need)
            if need.container_path:
                devices.append(index)
        elif disk_needs.has_file_system(mount, share.host_mounts):
            mount.source = share.add_file_system(mount.type, mount.source, mount.options, undo)
            mount.type, mount.options[:] = "bind", disk_needs.of_bind(mount.options)
        elif oci.is_bind(mount):
            mount.source, inherited = share.add_volume(source, mount.options, undo)
            place = str(share.on_host(mount.source))
            if (storage := oci.huge_pages_storage(source, place, spec)) is not None:
                volumes.storages.append(storage)
                mount.source = storage.mount_point
            if oci.is_kubelets(source, mount.options):
                volumes.kubelets.append(KubeletVolume(source, mount))
            mount.options.extend(inherited)
            mount.type = "bind"
    # The container gets these disks themselves, as device files.
    for index in reversed(devices):
        del spec.Mounts[index]
    return volumes

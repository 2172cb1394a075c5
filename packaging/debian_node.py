"""Builds kernel and initrd of the machine that tests/node boots: a Debian with systemd and cgroup v2 only.

    .venv/bin/python packaging/debian_node.py FOLDER

The kernel is that of Debian 13, out of its package, with what many hosts' kernels lack: device mapper, links of all
kinds, vhost. The root file system is the building host's own, which tests/node shares read-only; what the machine
writes stays in its memory. A file that says that all of this is a container is left out, since systemd believes it and
then ignores the kernel's command line. The initrd loads all modules at once, since a host may well have no modprobe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guest_image.apt import Apt
from guest_image.cpio import Tree
from guest_image.errors import ImageError
from guest_image.kernel import ModuleDirectory, vmlinux

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_image.apt import Package

CACHE = Path(__file__).resolve().parent.parent / "build" / "cache" / "node"
SUITE = "trixie"
BUSYBOX = Path("/bin/busybox")
#: How the initrd knows the shared root file system.
TAG = "root"
#: In the order of loading: the first one serves others that do not say so.
MODULES = (
    "crc32c_generic",
    # File systems and disks: of the machine itself, of containerd's snapshotters, of containers.
    *("overlay", "loop", "ext4", "xfs", "erofs", "dm_mod", "dm_thin_pool", "dm_snapshot", "dm_verity"),
    # KVM, by the SVM that QEMU emulates.
    *("kvm", "kvm_amd"),
    # The kernel's own parts of guests' devices.
    *("tun", "vhost_net", "vhost_vsock"),
    # Links, and what carries packets between a link and a guest.
    *("veth", "bridge", "dummy", "8021q", "macvlan", "macvtap", "ipvlan", "ipvtap", "ifb"),
    *(
        "sch_ingress",
        "sch_htb",
        "sch_tbf",
        "cls_u32",
        "cls_matchall",
        "cls_flower",
        "cls_bpf",
        "act_mirred",
        "act_skbmod",
    ),
    # Firewalls of CNI plugins.
    *(
        "nf_tables",
        "nft_compat",
        "iptable_nat",
        "iptable_filter",
        "xt_MASQUERADE",
        "xt_comment",
        "xt_conntrack",
    ),
)
#: The checkout, of which the kernel's command line tells, may be below one of the folders that are empty here.
INIT = f"""\
#!/busybox sh
/busybox mkdir /bin
/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read module; do insmod $module; done < /modules
mount -t virtiofs -o ro {TAG} /shared
mount -t tmpfs -o mode=755,size=80% written /written
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/shared,upperdir=/written/upper,workdir=/written/work root /root
mkdir /checkout
mount --bind /root$checkout /checkout
mount -t tmpfs -o mode=1777,size=80% tmp /root/tmp
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root$checkout
mount --move /checkout /root$checkout
cp /*.service /*.target /root/etc/systemd/system/
rm -f /root/.dockerenv
for place in proc sys dev; do mount --move /$place /root/$place; done
exec switch_root /root /lib/systemd/systemd
"""
#: Only what a host with containers has running: no logins, no timers, nothing that the building host has enabled.
TARGET = """\
[Unit]
Description=What tests of a whole machine need
Requires=sysinit.target dbus.socket node.service
After=sysinit.target
"""
#: Like containerd's own unit: control groups below it are its own affair.
SERVICE = """\
[Unit]
Description=Runs what the tests ask for
After=sysinit.target dbus.socket
[Service]
ExecStart=/usr/bin/python3 -S ${servant}
PassEnvironment=servant
Delegate=yes
TasksMax=infinity
OOMPolicy=continue
KillMode=mixed
ExecStopPost=/bin/systemctl --no-block --force poweroff
"""


def build(folder: Path) -> None:
    """Writes `vmlinux` and `initrd.img`. Raises ImageError."""
    apt = Apt(CACHE, arch="amd64", suite=SUITE)

    def choose() -> Sequence[Package]:
        return apt.alone(
            [name for name in apt.depends("linux-image-amd64") if name.startswith("linux-image-")]
        )

    root = apt.newest("kernel", choose, say)
    apt.forget_packages()
    modules = ModuleDirectory(next((root.path / "usr/lib/modules").iterdir()))
    image = root.find(f"boot/vmlinuz-{modules.release}")
    tree = Tree()
    for place in ("proc", "sys", "dev", "shared", "written", "root"):
        tree.directory(place)
    tree.character_device("dev/console", 5, 1)
    tree.file("busybox", BUSYBOX.read_bytes(), 0o755)
    tree.file("init", INIT.encode(), 0o755)
    tree.file("node.target", TARGET.encode())
    tree.file("node.service", SERVICE.encode())
    loaded = modules.closure(MODULES)
    for module in loaded:
        tree.file(f"m/{module.name}.ko", module.data)
    tree.file("modules", "".join(f"/m/{module.name}.ko\n" for module in loaded).encode())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vmlinux").write_bytes(vmlinux(image.read_bytes(), image.name, root))
    (folder / "initrd.img").write_bytes(tree.to_cpio())
    say(f"Linux {modules.release} with {len(loaded)} modules in {folder}")


def say(text: str) -> None:
    """One line of progress."""
    print(f"node: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build what tests/node boots.")
    parser.add_argument("folder", type=Path)
    try:
        build(parser.parse_args().folder)
    except ImageError as err:
        sys.exit(f"node: {err}")


if __name__ == "__main__":
    main()

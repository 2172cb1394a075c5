"""IBM Z: devices are on channels (ccw); what has no such form is on zPCI."""

from __future__ import annotations

from hypervisor.arch.record import Arch, Cpu, Devices

S390X = Arch(
    name="s390x",
    qemu_binary="qemu-system-s390x",
    machine="s390-ccw-virtio",
    machine_props={"kvm": "", "tcg": ""},
    cpu={"kvm": Cpu(model="host"), "tcg": Cpu(model="max")},
    devices=Devices(
        # QEMU has no vhost-user-vsock-ccw; this one brings its zPCI function along.
        user_vsock="vhost-user-vsock-pci",
        vhost_vsock="vhost-vsock-ccw",
        fs="vhost-user-fs-ccw",
        plan9="virtio-9p-ccw",
        block="virtio-blk-ccw",
        net="virtio-net-ccw",
        console="sclpconsole",
        bus="ccw",
    ),
    byte_order="big",
    plugs_vcpus=True,
    kernel_words=("console=ttysclp0", "cryptomgr.notests"),
)

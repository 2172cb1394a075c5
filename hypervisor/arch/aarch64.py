"""64-bit ARM: the virt machine."""

from __future__ import annotations

from hypervisor.arch.record import Arch, Cpu, Devices, Iommu

AARCH64 = Arch(
    name="aarch64",
    qemu_binary="qemu-system-aarch64",
    machine="virt",
    # The host's interrupt controller, whichever it has: KVM offers guests no other.
    machine_props={"kvm": "usb=off,gic-version=host", "tcg": "usb=off"},
    kvm_only_machine_props=frozenset({"gic-version=host"}),
    cpu={
        "kvm": Cpu(model="host"),
        # Not "max": emulated pointer authentication makes a boot several times slower before QEMU 10.
        "tcg": Cpu(model="cortex-a57"),
    },
    devices=Devices(
        user_vsock="vhost-user-vsock-pci",
        vhost_vsock="vhost-vsock-pci",
        fs="vhost-user-fs-pci",
        plan9="virtio-9p-pci",
        block="virtio-blk-pci",
        net="virtio-net-pci",
        console=None,
    ),
    # The board's PL011. There is no keyboard controller nor BIOS to reboot through: PSCI ends the machine.
    kernel_words=("console=ttyAMA0", "cryptomgr.notests"),
    # Devices sit behind the board's IOMMU when firmware describes one; the kernel is told not to go around it.
    iommu=Iommu(kernel_words=("iommu.passthrough=0",)),
    nvdimm=True,
    nvdimm_by_firmware=True,
    panic="pvpanic-pci",
    pcie_ports=True,
    numa=True,
)

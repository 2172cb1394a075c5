"""PCs: the q35 machine."""

from __future__ import annotations

from hypervisor.arch.record import Arch, Cpu, Devices, Iommu

X86_64 = Arch(
    name="x86_64",
    qemu_binary="qemu-system-x86_64",
    machine="q35",
    machine_props={"kvm": "", "tcg": ""},
    cpu={
        "kvm": Cpu(model="host"),
        # All that QEMU can emulate: models without RDRAND make the guest wait for entropy. Five-level paging
        # only costs: every page walk is emulated. And so do string instructions that a processor is said to be fast
        # at: kernel and libc then clear and copy pages with them, which are emulated byte by byte.
        "tcg": Cpu(model="max", features="la57=off,erms=off,fsrm=off"),
    },
    devices=Devices(
        user_vsock="vhost-user-vsock-pci",
        vhost_vsock="vhost-vsock-pci",
        fs="vhost-user-fs-pci",
        plan9="virtio-9p-pci",
        block="virtio-blk-pci",
        net="virtio-net-pci",
        console="isa-serial",
    ),
    # reboot=t: a triple fault needs no keyboard controller, and -no-reboot turns it into QEMU's exit.
    # The rest spares the kernel work: one UART to look for, no self-tests of ciphers, no SMP patching.
    kernel_words=("console=ttyS0", "reboot=t", "8250.nr_uarts=1", "cryptomgr.notests", "noreplace-smp"),
    tcg_kernel_words=("no_timer_check",),
    # The kernel watches a processor's own timer for a tenth of a second to know its rate. The machine's is known.
    tcg_one_cpu_words=("nolapic_timer",),
    iommu=Iommu(
        kernel_words=("intel_iommu=on", "iommu=pt"),
        device="intel-iommu",
        device_props="intremap=on,device-iotlb=on,caching-mode=on",
    ),
    nvdimm=True,
    dax=True,
    panic="pvpanic-pci",
    pcie_ports=True,
    numa=True,
    plug_in_bridge=True,
    plugs_vcpus=True,
    unplugs_vcpus=True,
    dimms=True,
    # The kernel would set 64 MiB aside for devices that reach no address above 4 GiB, as soon as there may be one.
    growth_words=("swiotlb=noforce",),
    no_nested_virtualization="vmx=off,svm=off",
    tsc=True,
)

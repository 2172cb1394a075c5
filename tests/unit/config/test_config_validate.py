"""Adjusted values and rules between keys; the host is made up, the files are the test's own."""

from collections.abc import Callable

import pytest

from config import HostLimits, validate
from config.tree import Report, Tree
from tests.unit.config.config_site import HOST, VERITY, Site

NAME = "want a name that no other has, of 1 to 10 letters, digits, _ and -"
WORDS = "want root_hash=...,salt=...,data_blocks=...,data_block_size=...,hash_block_size=..."

STORE = "enable_vhost_user_store = true\n"


@pytest.mark.parametrize(
    ("boot", "most", "cpus", "expected"),
    [
        ("1", 0, 8, (1.0, 8)),
        ("0", 0, 8, (1.0, 8)),
        ("-1", 0, 8, (8.0, 8)),
        ("-0.5", 3, 8, (3.0, 3)),
        ("9", 0, 8, (8.0, 8)),
        ("inf", 0, 8, (8.0, 8)),
        ("0.5", 2, 8, (0.5, 2)),
        ("2.5", 2, 8, (2.0, 2)),
        ("4", 100, 8, (4.0, 8)),
        ("300", 0, 384, (256.0, 256)),
        ("1", 300, 384, (1.0, 256)),
    ],
)
def test_processors(site: Site, boot: str, most: int, cpus: int, expected: tuple[float, int]) -> None:
    text = f"default_vcpus = {boot}\ndefault_maxvcpus = {most}\n"
    qemu = site.qemu(text, HostLimits(cpus, 1024)).config.hypervisor
    assert (qemu.default_vcpus, qemu.default_maxvcpus) == expected


@pytest.mark.parametrize(
    ("boot", "most", "slots", "expected"),
    [
        (2048, 0, 10, (2048, 4096, 10)),
        (0, 0, 0, (128, 4096, 128)),
        (64, 64, 1, (64, 64, 1)),
        (9000, 9000, 256, (4096, 4096, 256)),
        (512, 1024, 2, (512, 1024, 2)),
    ],
)
def test_memory(site: Site, boot: int, most: int, slots: int, expected: tuple[int, int, int]) -> None:
    text = f"default_memory = {boot}\ndefault_maxmemory = {most}\nmemory_slots = {slots}\n"
    qemu = site.qemu(text, HostLimits(1, 4096)).config.hypervisor
    assert (qemu.default_memory, qemu.default_maxmemory, qemu.memory_slots) == expected


def test_the_limits_of_this_host_are_plausible() -> None:
    host = HostLimits.of_this_host()
    assert host.cpus >= 1
    assert 64 < host.memory_mib < 2**30


@pytest.mark.parametrize(
    ("text", "key", "attribute", "expected"),
    [
        ("", "virtio_fs_queue_size", "hypervisor", 1024),
        ("[hypervisor.qemu]\ndefault_bridges = 0", "default_bridges", "hypervisor", 1),
        ("[hypervisor.qemu]\ndefault_bridges = 9", "default_bridges", "hypervisor", 5),
        ("[hypervisor.qemu]\nnetwork_queues = 0", "network_queues", "hypervisor", 1),
        ("[hypervisor.qemu]\nnetwork_queues = 300", "network_queues", "hypervisor", 256),
        ("[hypervisor.qemu]\nqueue_size = 0", "queue_size", "hypervisor", 128),
        ("[hypervisor.qemu]\nnum_queues = 0", "num_queues", "hypervisor", 1),
        (
            "[hypervisor.qemu]\ncpu_features = '+vmx,-avx,a.b=c d=e'",
            "cpu_features",
            "hypervisor",
            "+vmx,-avx,a.b=c d=e",
        ),
        ("[hypervisor.qemu]\nvirtio_fs_queue_size = 128", "virtio_fs_queue_size", "hypervisor", 128),
        ("[hypervisor.qemu]\nvirtio_fs_cache = 'none'", "virtio_fs_cache", "hypervisor", "never"),
        (
            "[hypervisor.qemu]\ncpu_features = ' pmu=off ,, avx512f=off,'",
            "cpu_features",
            "hypervisor",
            "pmu=off,avx512f=off",
        ),
        (
            "[hypervisor.qemu]\nmachine_accelerators = 'usb=off, hpet=off'",
            "machine_accelerators",
            "hypervisor",
            "usb=off,hpet=off",
        ),
        (
            "[hypervisor.qemu]\nseccompsandbox = 'on,spawn=deny'",
            "seccomp_sandbox",
            "hypervisor",
            "on,spawn=deny",
        ),
        ("[hypervisor.qemu]\nseccomp_sandbox = 'off'", "seccomp_sandbox", "hypervisor", ""),
        ("[hypervisor.qemu]\nentropy_source = ''", "entropy_source", "hypervisor", "/dev/urandom"),
        ("[hypervisor.qemu]\nenable_debug = true", "log_level", "hypervisor", "debug"),
        ("[agent.kata]\nenable_debug = true", "log_level", "agent", "debug"),
        ("[agent.kata]\nenable_debug = true\nlog_level = 'trace'", "log_level", "agent", "trace"),
        ("[runtime]\nenable_debug = true\nlog_level = 'error'", "log_level", "runtime", "error"),
        ("[runtime]\nenable_debug = true", "log_level", "runtime", "debug"),
        ("[agent.kata]\nserver_addr = 'unix:/run/a.sock'", "server_addr", "agent", "unix:/run/a.sock"),
        ("[agent.kata]\ndial_timeout_ms = 9\nreconnect_timeout_ms = 9", "reconnect_timeout_ms", "agent", 9),
    ],
)
def test_adjusted_values(site: Site, text: str, key: str, attribute: str, expected: object) -> None:
    site.drop_in("0", "[hypervisor.qemu]\n" + site.required())
    site.drop_in("1", text)
    assert getattr(getattr(site.load("").config, attribute), key) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("default_memory = 63", "default_memory: 63 MiB is too little for a guest, want at least 64"),
        ("default_maxmemory = 1000", "default_maxmemory: 1000 MiB is less than the 2048 of default_memory"),
        ("virtio_fs_queue_size = 1000", "virtio_fs_queue_size: want a power of two, got 1000"),
        ("file_mem_backend = '/nowhere'", "file_mem_backend: '/nowhere' is no directory"),
        (
            "selinux_label = 'container_t'",
            "selinux_label: 'container_t' is not user:role:type or user:role:type:level",
        ),
        (
            "selinux_label = 'a:b:c:s0 x'",
            "selinux_label: 'a:b:c:s0 x' is not user:role:type or user:role:type:level",
        ),
        ("rootless = true\nenable_hugepages = true", "rootless: huge pages are for root only"),
        (
            "rootless = true\nextra_monitor_socket = 'hmp'\nenable_debug = true",
            "rootless: QEMU cannot make a socket in root's directory",
        ),
        ("guest_memory_dump_path = 'crash'", "guest_memory_dump_path: want an absolute path, got 'crash'"),
        ("file_mem_backend = 'dev/shm'", "file_mem_backend: 'dev/shm' is no directory"),
        ("queue_size = 100", "queue_size: want a power of two, 4 to 1024, got 100"),
        ("queue_size = 2", "queue_size: want a power of two, 4 to 1024, got 2"),
        ("queue_size = 2048", "queue_size: want a power of two, 4 to 1024, got 2048"),
        ("num_queues = 1025", "num_queues: want at most 1024, got 1025"),
        ("indep_iothreads = 257", "indep_iothreads: want int 0..256, got 257"),
        (
            "enable_iommu_platform = true",
            "enable_iommu_platform: a machine of type q35 has no devices on channels",
        ),
        ("pcie_root_port = 17", "pcie_root_port: want at most 16, got 17"),
        (
            "pcie_root_port = 1\npcie_switch_port = 1",
            "pcie_switch_port: spare ports are of the root complex or of a switch, not of both",
        ),
        (
            "machine_type = 's390-ccw-virtio'\npcie_root_port = 1",
            "pcie_root_port: guests with s390x have no PCIe ports",
        ),
        (
            "machine_type = 's390-ccw-virtio'\nenable_iommu = true",
            "enable_iommu: guests with s390x have no virtual IOMMU",
        ),
        (
            f"{STORE}vhost_user_store_path = '/'\ndisable_block_device_use = true",
            "enable_vhost_user_store: no disk reaches the guest with disable_block_device_use",
        ),
        (
            f"{STORE}vhost_user_store_path = '/'\nrootless = true",
            "enable_vhost_user_store: QEMU cannot open the sockets of other programs with rootless",
        ),
        (
            f"{STORE}vhost_user_store_path = '/'\nmachine_type = 's390-ccw-virtio'",
            "enable_vhost_user_store: guests with s390x have no disks that other programs serve",
        ),
        (
            "enable_guest_swap = true\ndisable_block_device_use = true",
            "enable_guest_swap: no disk reaches the guest with disable_block_device_use",
        ),
        (
            "enable_guest_swap = true\nblock_device_driver = 'virtio-scsi'",
            "enable_guest_swap: swap is on virtio disks, and block_device_driver is virtio-scsi",
        ),
        (
            "enable_guest_swap = true\nmachine_type = 's390-ccw-virtio'",
            "enable_guest_swap: guests with s390x have no swap",
        ),
        (f"{STORE}vhost_user_store_path = '/nowhere'", "vhost_user_store_path: '/nowhere' is no directory"),
        (
            "machine_type = 's390-ccw-virtio'\nenable_numa = true",
            "enable_numa: guests with s390x have no NUMA nodes",
        ),
        (
            "machine_type = 's390-ccw-virtio'\nnuma_mapping = ['0']",
            "numa_mapping: guests with s390x have no NUMA nodes",
        ),
        (
            "numa_mapping = ['0', '1 2']",
            'numa_mapping[1]: want nodes of the host, as in "0" or "0,2-3", got \'1 2\'',
        ),
        ("numa_mapping = ['']", 'numa_mapping[0]: want nodes of the host, as in "0" or "0,2-3", got \'\''),
        (
            "numa_mapping = ['3-1']",
            "numa_mapping[0]: want numbers up to 1023, the smaller one first, got '3-1'",
        ),
        (
            "numa_mapping = ['0-1024']",
            "numa_mapping[0]: want numbers up to 1023, the smaller one first, got '0-1024'",
        ),
        (f"numa_mapping = {['0'] * 129}", "numa_mapping: want at most 128 nodes"),
        (
            "file_mem_backend = '/dev/shm'\nenable_hugepages = true",
            "file_mem_backend: guest memory is files or huge pages, not both",
        ),
        (f"kernel_verity_params = '{VERITY}'", "kernel_verity_params: is of use only with image"),
        ("guest_hook_path = 'hooks'", "guest_hook_path: want an absolute path in the guest, got 'hooks'"),
        ("guest_hook_path = '/a/../b'", "guest_hook_path: want an absolute path in the guest, got '/a/../b'"),
        (
            "kernel_verity_params = 'root_hash=00'",
            f"kernel_verity_params: salt is missing; {WORDS}",
        ),
        ("machine_accelerators = '-a'", "machine_accelerators: want properties as in a=b,c=d, got '-a'"),
        ("machine_accelerators = '=b'", "machine_accelerators: want properties as in a=b,c=d, got '=b'"),
        (
            "machine_accelerators = 'usb=off, kernel=/etc/passwd'",
            "machine_accelerators: kernel of the machine is set by another key: kernel",
        ),
        (
            "machine_accelerators = 'accel=tcg'",
            "machine_accelerators: accel of the machine is set by another key: accel",
        ),
        ("cpu_features = 'a b=c'", "cpu_features: want properties as in a=b,c=d, got 'a b=c'"),
        (
            "guest_extension_images = [{name = 'a b', path = '/bin/sh'}]",
            f"guest_extension_images[0].name: {NAME}, got 'a b'",
        ),
        (
            "guest_extension_images = [{name = 'elevenchars', path = '/bin/sh'}]",
            f"guest_extension_images[0].name: {NAME}, got 'elevenchars'",
        ),
        (
            "guest_extension_images = [{name = 'a', path = '/bin/sh'}, {name = 'a', path = '/bin/sh'}]",
            f"guest_extension_images[1].name: {NAME}, got 'a'",
        ),
        (
            "guest_extension_images = [{name = 'a', path = '/none'}]",
            "guest_extension_images[0].path: /none does not exist",
        ),
        (
            "guest_extension_images = [{name = 'a', path = '/bin/sh', verity_params = 'x y=z'}]",
            f"guest_extension_images[0].verity_params: 'x y' is not known; {WORDS}",
        ),
        ("firmware_volume = '/dev/null'", "firmware_volume: is of use only with firmware"),
        ("pflashes = ['/nowhere']", "pflashes: /nowhere does not exist"),
        (
            "firmware = '/dev/null'\npflashes = ['/dev/null']",
            "pflashes: firmware is a file or flash memory, not both",
        ),
        (
            "initrd = ''\nimage = '/dev/null'\nvm_rootfs_driver = 'virtio-scsi'",
            "vm_rootfs_driver: the machine has no virtio-scsi for image",
        ),
        ("image_initrd = '/dev/null'", "image_initrd: is of use only with image"),
        (
            "initrd = ''\nimage = '/dev/null'\nimage_initrd = '/nowhere'",
            "image_initrd: /nowhere does not exist",
        ),
        ("virtio_fs_extra_args = ['-o', 'a\\b']", None),
        (
            'virtio_fs_extra_args = ["-o", "a\\tb"]',
            r"virtio_fs_extra_args: want printable text on one line, got 'a\tb'",
        ),
        ("seccomp_sandbox = 'yes'", "seccomp_sandbox: 'yes' is not a filter that QEMU knows"),
        (
            "seccomp_sandbox = 'on,spawn=maybe'",
            "seccomp_sandbox: 'on,spawn=maybe' is not a filter that QEMU knows",
        ),
        (
            "seccomp_sandbox = 'off,spawn=deny'",
            "seccomp_sandbox: 'off,spawn=deny' is not a filter that QEMU knows",
        ),
        ("seccomp_sandbox = ',spawn=deny'", "seccomp_sandbox: ',spawn=deny' is not a filter that QEMU knows"),
        ("seccompsandbox = 'x'", "seccompsandbox: 'x' is not a filter that QEMU knows"),
        (
            "seccomp_sandbox = 'on'\nseccompsandbox = 'on,spawn=deny'",
            "seccompsandbox: is 'on,spawn=deny', but seccomp_sandbox is 'on'",
        ),
        ("firmware = 'OVMF.fd'", "firmware: want an absolute path, got 'OVMF.fd'"),
        ("firmware = '/nonexistent/OVMF.fd'", "firmware: /nonexistent/OVMF.fd does not exist"),
        ("initrd = '/usr'", "initrd: /usr is a directory, want a file"),
        ("path = '/etc/passwd'", "path: /etc/passwd is not executable"),
        ('kernel = "/a\\nb"', r"kernel: '/a\nb' does not exist"),
        ('kernel = "/a\\u0000b"', r"kernel: '/a\x00b' does not exist"),
        ("kernel = ''", "kernel: want a file, got ''"),
        ("entropy_source = '/dev/nonsense'", "entropy_source: /dev/nonsense does not exist"),
        ("virtio_fs_daemon = '/nonexistent/v'", "virtio_fs_daemon: /nonexistent/v does not exist"),
    ],
)
def test_rules_of_the_machine(site: Site, line: str, problem: str | None) -> None:
    if problem is None:
        assert site.qemu(line + "\n").config.hypervisor.virtio_fs_extra_args == ("-o", "a\\b")
    else:
        assert site.problems(line + "\n") == [f"hypervisor.qemu.{problem}"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("reconnect_timeout_ms = 9", "reconnect_timeout_ms: 9 is less than the 10 of dial_timeout_ms"),
        ("server_port = 1025", "log_port: is 1025, as server_port is"),
        (
            "kernel_modules = ['loop', '  ']",
            "kernel_modules[1]: want a module's name and parameters, got '  '",
        ),
        ("server_addr = 'tcp:1.2.3.4'", "server_addr: 'tcp:1.2.3.4' is not an address of an agent"),
        ("server_addr = 'unix:relative'", "server_addr: 'unix:relative' is not an address of an agent"),
        ("server_port = 4294967295", "server_port: want int 1..4294967294, got 4294967295"),
        ("create_container_timeout = 0", "create_container_timeout: want int 1..4294967295, got 0"),
    ],
)
def test_rules_of_the_agent(site: Site, in_qemu: Callable[[str], str], lines: str, problem: str) -> None:
    (line,) = site.lines(in_qemu(f"[agent.kata]\n{lines}\n"))
    assert line.removeprefix(f"{site.file}: ").startswith(f"agent.kata.{problem}")


def test_the_default_initrd_stands_in_when_nothing_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "DEFAULT_INITRD", "/nonexistent/initrd.img")
    lines = site.required().replace("initrd =", "firmware =")
    found = site.lines("[hypervisor.qemu]\n" + lines)
    missing = "/nonexistent/initrd.img does not exist (build the guest with: kata-py guest build)"
    assert found == [f"{site.file}: hypervisor.qemu.initrd: {missing}"]


def test_links_are_resolved(site: Site) -> None:
    (site.root / "current").symlink_to("kernel")
    qemu = site.qemu(f'kernel = "{site.root / "current"}"\n').config.hypervisor
    assert qemu.kernel == str(site.root / "kernel")


def test_virtiofsd_is_searched(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    second = str(site.root / "virtiofsd")
    monkeypatch.setattr(validate, "VIRTIOFSD_PLACES", (str(site.root / "none"), second))
    assert site.qemu('virtio_fs_daemon = ""\n').config.hypervisor.virtio_fs_daemon == second


def test_virtiofsd_is_missing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "VIRTIOFSD_PLACES", ("/nonexistent/a", "/nonexistent/b"))
    expected = "hypervisor.qemu.virtio_fs_daemon: there is no virtiofsd at /nonexistent/a or /nonexistent/b"
    assert site.problems('virtio_fs_daemon = ""\n') == [expected]


def test_virtiofsd_is_not_looked_at_when_nothing_is_shared(site: Site) -> None:
    config = site.qemu('shared_fs = "none"\nvirtio_fs_daemon = "/nonexistent/v"\n').config
    assert config.hypervisor.virtio_fs_daemon == "/nonexistent/v"


def test_adjusting_twice_changes_nothing(site: Site) -> None:
    config = site.qemu("default_vcpus = -1\nseccompsandbox = 'on'\nvirtio_fs_cache = 'none'\n").config
    report = Report(Tree(None, {}))
    assert validate.adjust_and_validate(config, HOST, report) == config
    report.raise_any()


@pytest.mark.parametrize(
    ("machine", "program"),
    [("q35", "x86_64"), ("virt", "aarch64"), ("s390-ccw-virtio", "s390x")],
)
def test_the_usual_program_is_the_machines(
    site: Site, monkeypatch: pytest.MonkeyPatch, machine: str, program: str
) -> None:
    monkeypatch.setattr("config.validate._QemuTopics._file", lambda self, name, path, **_: path)
    for path in ("", "/usr/bin/qemu-system-x86_64"):
        config = site.qemu(f"path = '{path}'\nmachine_type = '{machine}'").config
        assert config.hypervisor.path == f"/usr/bin/qemu-system-{program}"
    assert site.qemu(f"path = '/x'\nmachine_type = '{machine}'").config.hypervisor.path == "/x"

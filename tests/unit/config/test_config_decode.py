"""Every mistake is reported, in one line that says where it is and what to do."""

from collections.abc import Callable

import pytest

from config import ConfigError, Problem
from tests.unit.config.config_site import Site

Text = Callable[[str], str]

SHARED_FS = "hypervisor.qemu.shared_fs"
SHARED_FS_HINT = "other ways of sharing are not supported in this version"
SECTOR_SIZES = "want one of 0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("default_vcpus = true", "default_vcpus: want number, got true"),
        ("default_vcpus = nan", "default_vcpus: want a number, got nan"),
        ("default_memory = 1.0", "default_memory: want int 0..4294967295, got 1.0"),
        ("default_memory = -1", "default_memory: want int 0..4294967295, got -1"),
        ("default_memory = 4294967296", "default_memory: want int 0..4294967295, got 4294967296"),
        ("memory_slots = 0x1_0000_0000_0000_0000", "memory_slots: want int 0..256, got a very large number"),
        ("overhead_vcpus = -0.1", "overhead_vcpus: want number >= 0, got -0.1"),
        ("kernel = ['/k']", "kernel: want string, got an array"),
        ("kernel = {file = '/k'}", "kernel: want string, got a table"),
        ("kernel = 2024-02-29", "kernel: want string, got the date or time 2024-02-29"),
        ("pflashes = 'a'", "pflashes: want array of string, got 'a'"),
        ("pflashes = ['a', [], 'b']", "pflashes[1]: want string, got []"),
        ("accel = 'KVM'", "accel: want one of auto, kvm, tcg, got 'KVM'"),
        ("machine_type = 'pc'", "machine_type: want one of q35, virt, s390-ccw-virtio, got 'pc'"),
        ("shared_fs = 'virtio-9p'", "shared_fs: want one of virtio-fs, none, got 'virtio-9p'"),
        (
            "extra_monitor_socket = 'x'",
            "extra_monitor_socket: want one of \"\", hmp, qmp, qmp-pretty, got 'x'",
        ),
        (
            "block_device_physical_sector_size = 513",
            f"block_device_physical_sector_size: {SECTOR_SIZES}, got 513",
        ),
        ("memory_slots = 257", "memory_slots: want int 0..256, got 257"),
        ("boot_timeout_s = 0", "boot_timeout_s: want int 1..4294967295, got 0"),
        ("factory = 3", "factory: want a table, got 3"),
        ("factory.enable_tempate = false", "factory.enable_tempate: unknown key"),
        ("rootless_user.groups = [1, -1]", "rootless_user.groups[1]: want int 0..4294967295, got -1"),
        ("guest_extension_images = [{path = ''}]", "guest_extension_images[0].name: this key is missing"),
        ("guest_extension_images = [1]", "guest_extension_images[0]: want a table, got 1"),
        ('"a\\nb" = 1', r"'a\nb': unknown key"),
        ('kernel_params = """a\nb"""', r"kernel_params: want printable text on one line, got 'a\nb'"),
        ('cpu_features = "a\\u0000"', r"cpu_features: want printable text on one line, got 'a\x00'"),
    ],
)
def test_one_mistake(site: Site, in_qemu: Text, line: str, problem: str) -> None:
    files = [row for row in in_qemu("").splitlines(True) if row.split(" ")[0] != line.split(" ")[0]]
    with pytest.raises(ConfigError) as caught:
        site.load("".join(files) + line + "\n")
    (found,) = caught.value.problems
    assert found.file == site.file
    assert f"{found.key}: {found.problem}" == f"hypervisor.qemu.{problem}"
    assert len(str(caught.value).splitlines()) == 1


def test_ten_mistakes_give_ten_lines(site: Site) -> None:
    text = f"""
        surprise = 1
        [hypervisor.qemu]
        {site.required()}
        kernle = "/x"
        default_vcpus = "2"
        default_memory = -1
        shared_fs = "virtio-9p"
        jailer_path = "/usr/bin/jailer"
        virtio_fs_extra_args = ["-o", 3]
        [agent.kata]
        dial_timeout_ms = 0
        vsock = "user"
        [runtime]
        log_level = "loud"
        """
    assert [line.removeprefix(f"{site.file}: ") for line in site.lines(text)] == [
        "surprise: unknown key",
        "runtime.log_level: want one of trace, debug, info, warn, error, critical, got 'loud'",
        "hypervisor.qemu.kernle: unknown key (did you mean kernel?)",
        "hypervisor.qemu.default_vcpus: want number, got '2'",
        "hypervisor.qemu.default_memory: want int 0..4294967295, got -1",
        f"{SHARED_FS}: want one of virtio-fs, none, got 'virtio-9p' ({SHARED_FS_HINT})",
        "hypervisor.qemu.virtio_fs_extra_args[1]: want string, got 3",
        "agent.kata.dial_timeout_ms: want int 1..4294967295, got 0",
        "agent.kata.vsock: unknown key (it belongs to [hypervisor.qemu])",
        (
            "hypervisor.qemu.jailer_path: not supported in this version: "
            "QEMU has no jailer (remove the key or set it to '')"
        ),
    ]


def test_what_is_built_on_a_wrong_value_is_no_second_problem(site: Site, in_qemu: Text) -> None:
    assert site.lines("hypervisor = 3") == [f"{site.file}: hypervisor: want a table, got 3"]
    lines = site.lines(in_qemu("[agent.kata]\ndial_timeout_ms = 4000\nreconnect_timeout_ms = ''"))
    assert lines == [f"{site.file}: agent.kata.reconnect_timeout_ms: want int 1..4294967295, got ''"]
    lines = site.lines(in_qemu("[agent.kata]\ndial_timeout_ms = 0\nreconnect_timeout_ms = 5"))
    assert lines == [f"{site.file}: agent.kata.dial_timeout_ms: want int 1..4294967295, got 0"]


@pytest.mark.parametrize(
    "key", ["shared_fs", "block_device_driver", "vm_rootfs_driver", "machine_type", "accel"]
)
def test_an_empty_choice_is_the_default(site: Site, key: str) -> None:
    plain = site.qemu("").config
    assert site.qemu(f'{key} = ""\n').config == plain


def test_sections_that_were_not_chosen_are_not_read(site: Site, in_qemu: Text) -> None:
    text = "[hypervisor.clh]\npath = 3\nwhatever = 4\n[agent.other]\nx = 1\n[agent.kata]\nserver_port = 5\n"
    result = site.load(in_qemu(text))
    assert result.config.agent.server_port == 5
    assert result.warnings == ()


def test_unknown_top_level_sections_are_named(site: Site, in_qemu: Text) -> None:
    text = in_qemu('[netmon]\nx = 1\n["odd name"]\n[[image]]\npath = "x"\n')
    assert site.load(text).warnings == (f"{site.file}: nothing reads the sections netmon, 'odd name', image",)


def test_a_section_must_exist_when_there_are_others(site: Site) -> None:
    found = "(found only [hypervisor.quemu], [hypervisor.clh])"
    assert site.lines("[hypervisor.quemu]\n[hypervisor.clh]") == [
        f"{site.file}: hypervisor.qemu: this section is missing {found}"
    ]


def test_only_our_own_hypervisor_can_be_chosen(site: Site) -> None:
    assert site.lines('[runtime]\nhypervisor_name = "clh"\n[hypervisor.clh]\npath = "/x"\n')[0] == (
        f"{site.file}: runtime.hypervisor_name: want qemu, got 'clh' (kata-py runs QEMU only)"
    )


def test_a_key_directly_below_hypervisor_is_misplaced(site: Site, in_qemu: Text) -> None:
    assert site.lines(in_qemu("") + "[hypervisor]\nkernel = '/k'\n") == [
        f"{site.file}: hypervisor.kernel: unknown key (keys belong below [hypervisor.qemu])"
    ]


def test_long_values_are_cut(site: Site) -> None:
    (problem,) = site.problems(f'accel = "{"x" * 10_000}"\n')
    assert len(problem) < 200


def test_the_error_is_one_line_for_each_problem() -> None:
    error = ConfigError((Problem(None, "a.b", "is odd"), Problem(None, "", "is even", "make it odd")))
    assert str(error) == "built-in defaults: a.b: is odd\nbuilt-in defaults: is even (make it odd)"

"""Confidential guests: what is turned off for them, what they cannot be without, and the files for each kind."""

import csv
import tomllib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from config import LoadedConfig, load
from config.confidential import problems, without
from config.schema import SECTIONS, Qemu, info
from tests.unit.config.config_site import HOST, Site
from tests.unit.config.test_config_effects import kata_template

DEFAULTS = Path(__file__).resolve().parents[3] / "config" / "defaults"
KEYS = Path(__file__).parent / "data" / "kata_keys.tsv"
# The kinds, and the column with the values of Kata's template for each.
KINDS = {"tdx": "tdx_3_26", "snp": "snp_3_26", "se": "se_4_1"}
# What a guest that shares no files, that does not grow and gets no block devices later has no use for, and what pods
# may name that this version does not use.
OF_NO_USE = {
    "memory_slots",
    "block_device_driver",
    "disable_block_device_use",
    "virtio_fs_daemon",
    "virtio_fs_cache",
    "virtio_fs_extra_args",
    "virtio_fs_queue_size",
    "valid_virtio_fs_daemon_paths",
    "valid_vhost_user_store_paths",
    "vhost_user_store_path",
    "guest_swap_path",
    "valid_entropy_sources",
    "valid_file_mem_backends",
}
ID_BLOCK, ID_AUTH = b64encode(bytes(96)).decode(), b64encode(b"\1" * 4096).decode()
SNP = f"confidential_guest = true\nsev_snp_guest = true\nsnp_id_block = '{ID_BLOCK}'\nsnp_id_auth = '{ID_AUTH}'\n"
SEALED = 'confidential_guest = true\nmachine_type = "s390-ccw-virtio"\ninitrd = ""\n'
QUIET = 'shared_fs = "none"\n'


def confidential(site: Site, text: str = "") -> LoadedConfig:
    """A guest on a PC that has all it needs."""
    firmware = site.root / "firmware"
    firmware.touch()
    return site.qemu(f'confidential_guest = true\nfirmware = "{firmware}"\n{text}')


def wrong(site: Site, text: str) -> list[str]:
    firmware = site.root / "firmware"
    firmware.touch()
    return site.problems(text if "firmware =" in text else f'firmware = "{firmware}"\n{text}')


def test_a_guest_that_asks_for_nothing_else_loses_nothing(site: Site) -> None:
    found = confidential(site, QUIET + 'entropy_source = ""\nfile_mem_backend = ""\n')
    assert found.warnings == ()
    assert found.config.hypervisor.confidential_guest


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("", "shared_fs", "none"),
        ('shared_fs = "virtio-fs"', "shared_fs", "none"),
        (f"{QUIET}enable_hugepages = true", "enable_hugepages", False),
        (f'{QUIET}file_mem_backend = "/dev/shm"', "file_mem_backend", ""),
        (
            f"{QUIET}enable_vhost_user_store = true\nvhost_user_store_path = '/'",
            "enable_vhost_user_store",
            False,
        ),
        (f"{QUIET}enable_virtio_mem = true", "enable_virtio_mem", False),
        (f"{QUIET}enable_guest_swap = true", "enable_guest_swap", False),
        (f"{QUIET}reclaim_guest_freed_memory = true", "reclaim_guest_freed_memory", False),
        (f'{QUIET}guest_memory_dump_path = "/var/crash"', "guest_memory_dump_path", ""),
        (f'{QUIET}entropy_source = "/dev/random"', "entropy_source", "/dev/urandom"),
        (f"{QUIET}default_maxvcpus = 4", "default_maxvcpus", 1),
        (f"{QUIET}default_maxmemory = 4096", "default_maxmemory", 2048),
    ],
)
def test_what_cannot_work_is_turned_off_and_said(site: Site, line: str, key: str, value: object) -> None:
    found = confidential(site, line)
    assert getattr(found.config.hypervisor, key) == value
    (warning,) = found.warnings
    assert f": hypervisor.qemu.{key}: turned off for a confidential guest: " in warning
    assert warning.endswith(")")  # what keeps it quiet


def test_an_image_is_a_disk_and_no_persistent_memory(site: Site) -> None:
    (site.root / "image").write_bytes(b"disk")
    text = f'{QUIET}initrd = ""\nimage = "{site.root / "image"}"\nvm_rootfs_driver = "virtio-pmem"\n'
    found = confidential(site, text)
    assert found.config.hypervisor.disable_image_nvdimm
    (warning,) = found.warnings
    assert "hypervisor.qemu.vm_rootfs_driver: turned off for a confidential guest: an nvdimm" in warning
    assert confidential(site, f"{text}disable_image_nvdimm = true\n").warnings == ()


@pytest.mark.parametrize(
    ("vcpus", "most", "kept"),
    [
        (1.0, 0, 1),
        (1.5, 0, 2),
        (0.0, 0, 1),
        (3.0, 2, 2),
        (-1.0, 0, 0),
        (-1.0, 4, 4),
        (float("nan"), 0, 0),
        (float("inf"), 9, 9),
    ],
)
def test_processors_at_boot_are_all_there_ever_are(vcpus: float, most: int, kept: int) -> None:
    found, remarks = without(
        Qemu(confidential_guest=True, shared_fs="none", default_vcpus=vcpus, default_maxvcpus=most)
    )
    assert (found.default_maxvcpus, remarks) == (kept, [])


def test_the_most_that_is_allowed_stays_a_limit(site: Site) -> None:
    found = confidential(site, f"{QUIET}default_vcpus = 4\ndefault_maxvcpus = 2\n").config.hypervisor
    assert (found.default_vcpus, found.default_maxvcpus) == (2.0, 2)
    (line,) = wrong(
        site, f"confidential_guest = true\n{QUIET}default_memory = 512\ndefault_maxmemory = 256\n"
    )
    assert line == "hypervisor.qemu.default_maxmemory: 256 MiB is less than the 512 of default_memory"


def test_processors_follow_the_pods_size(site: Site) -> None:
    found = confidential(site, f"{QUIET}default_vcpus = 3\ndefault_memory = 512\n").config.hypervisor
    assert (found.default_maxvcpus, found.default_maxmemory) == (3, 512)


def test_an_ordinary_guest_keeps_everything() -> None:
    qemu = Qemu(enable_hugepages=True, default_maxvcpus=8)
    assert without(qemu) == (qemu, [])
    assert list(problems(qemu)) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'confidential_guest = true\nmachine_type = "virt"\n',
            "machine_type: arm64 guests cannot be confidential",
        ),
        ('confidential_guest = true\naccel = "tcg"\n', "accel: a confidential guest needs KVM"),
        ('confidential_guest = true\nvsock = "user"\n', "vsock: the shim's own device would have to map"),
        (
            'confidential_guest = true\nfirmware = ""\n',
            "firmware: a confidential guest starts from firmware made",
        ),
        (
            f'{SEALED}pflashes = ["/dev/null"]\nfirmware = ""\n',
            "pflashes: a confidential guest has no flash memory",
        ),
        (
            'confidential_guest = true\nfirmware_volume = "/dev/null"\n',
            "firmware_volume: a confidential guest has no flash memory",
        ),
        ("sev_snp_guest = true\n", "sev_snp_guest: protects nothing without confidential_guest"),
        (
            f"{SEALED}sev_snp_guest = true\n",
            "sev_snp_guest: s390-ccw-virtio guests have no SEV-SNP",
        ),
        (
            f"confidential_guest = true\nsnp_id_block = '{ID_BLOCK}'\nsnp_id_auth = ''\n",
            "snp_id_block: is of use only with sev_snp_guest",
        ),
        (SNP.replace(ID_AUTH, ""), "snp_id_block: is of use only together with snp_id_auth"),
        (SNP.replace(ID_BLOCK, ""), "snp_id_auth: is of use only together with snp_id_block"),
        (SNP.replace(ID_BLOCK, "AAAA"), "snp_id_block: want base64 of 96 bytes, got 3 bytes"),
        (SNP.replace(ID_BLOCK, ID_AUTH), "snp_id_block: want base64 of 96 bytes, got 4096 bytes"),
        (SNP.replace(ID_AUTH, ID_AUTH[:-4]), "snp_id_auth: want base64 of 4096 bytes, got 4095 bytes"),
        (SNP.replace(ID_BLOCK, "%" * 128), f"snp_id_block: want base64 of 96 bytes, got '{'%' * 77}...'"),
        (
            SNP.replace(ID_BLOCK, f" {ID_BLOCK}"),
            f"snp_id_block: want base64 of 96 bytes, got ' {'A' * 76}...'",
        ),
        (f"{SNP}snp_guest_policy = -1\n", "snp_guest_policy: want int >= 0, got -1"),
        (
            f"{SNP}snp_guest_policy = {2**64 + 0x20000}\n",
            "snp_guest_policy: want up to 64 bits, of which 0x20000",
        ),
        (
            f"{SNP}snp_guest_policy = 1\n",
            "snp_guest_policy: want up to 64 bits, of which 0x20000 is always set, got 1",
        ),
        (
            "tdx_quote_generation_service_socket_port = 4294967295\n",
            "tdx_quote_generation_service_socket_port: want int 0..4294967294, got 4294967295",
        ),
    ],
)
def test_what_keeps_it_from_starting(site: Site, text: str, said: str) -> None:
    (line,) = wrong(site, text)
    assert line.startswith(f"hypervisor.qemu.{said}")


def test_all_of_it_at_once(site: Site) -> None:
    text = (
        'confidential_guest = true\nfirmware = ""\naccel = "tcg"\nvsock = "user"\nsev_snp_guest = true\n'
        f"snp_id_block = 'AAAA'\nsnp_id_auth = '{ID_AUTH}'\nsnp_guest_policy = 0\ninitdata = '%'\n"
    )
    assert [line.split(": ")[0].rpartition(".")[2] for line in site.problems(text)] == [
        "snp_id_block", "snp_guest_policy", "accel", "vsock", "firmware", "initdata",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", [0x20000, 0x30000, 2**63 - 1, 2**64 - 1])
def test_a_guest_with_an_identity(site: Site, policy: int) -> None:
    found = confidential(
        site, f"{QUIET}{SNP}snp_guest_policy = {policy}\n".replace("confidential_guest = true\n", "")
    )
    assert found.warnings == ()
    assert found.config.hypervisor.snp_guest_policy == policy


def test_files_that_are_not_there_are_not_kata_pys_own(site: Site) -> None:
    text = SEALED.replace(
        'initrd = ""\n', 'initrd = ""\nkernel = "/nonexistent"\nfirmware = "/nonexistent"\n'
    )
    lines = site.lines(f'[hypervisor.qemu]\npath = "{site.root / "qemu"}"\n{text}')
    assert [line.split(": ")[-1] for line in lines] == [
        "/nonexistent does not exist (install a guest made for this, as Kata Containers has them)",
        "/nonexistent does not exist (name OVMF made for TDX (OVMF.inteltdx.fd) or SEV-SNP (AMDSEV.fd))",
    ]


@pytest.mark.parametrize("key", ["image", "initrd"])
def test_secure_execution_has_everything_in_the_kernel(site: Site, key: str) -> None:
    found = site.qemu(SEALED + QUIET).config.hypervisor
    assert (found.image, found.initrd) == ("", "")
    named = f'{key} = "{site.root / "kernel"}"\n'
    (line,) = site.problems(SEALED.replace('initrd = ""\n', named) if key == "initrd" else SEALED + named)
    assert (
        line == f"hypervisor.qemu.{key}: a guest with Secure Execution has its root file system inside kernel"
    )


def present(site: Site, kind: str) -> str:
    """Keys of a template that name files, with files that are there."""
    names = {"path": "qemu", "kernel": "kernel"}
    names |= {"tdx": {"image": "image"}, "snp": {"initrd": "initrd"}, "se": {}}[kind]
    if kind != "se":
        names["firmware"] = "firmware"
    for name in names.values():
        (site.root / name).touch(mode=0o755)
    return "".join(f'{key} = "{site.root / name}"\n' for key, name in names.items())


@pytest.mark.parametrize("kind", KINDS)
def test_our_files_load_without_warnings(site: Site, kind: str) -> None:
    site.file.write_text((DEFAULTS / f"configuration-qemu-{kind}.toml").read_text())
    site.drop_in("10-files.toml", f"[hypervisor.qemu]\n{present(site, kind)}")
    found = load(site.file, env={}, host=HOST)
    assert found.warnings == ()
    assert found.config.hypervisor.confidential_guest
    assert found.config.hypervisor.shared_fs == "none"


def rows(column: str) -> list[tuple[str, str, Any]]:
    """Section, key and value of what a template of Kata sets and what has an effect here."""
    lines = KEYS.read_text().splitlines()[1:]
    table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [
        (row["section"], row["key"], tomllib.loads(f"x = {row[column]}")["x"])
        for row in table
        if row[column] != "-" and info(SECTIONS[row["section"]], row["key"]).effect == "now"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_our_files_say_what_katas_say(kind: str) -> None:
    ours = tomllib.loads((DEFAULTS / f"configuration-qemu-{kind}.toml").read_text())
    tables = {
        "hypervisor.qemu": ours["hypervisor"]["qemu"],
        "agent.kata": ours["agent"]["kata"],
        "runtime": ours["runtime"],
    }
    compared = 0
    for section, key, value in rows(KINDS[kind]):
        if key in OF_NO_USE or section not in tables:
            continue
        default = getattr(SECTIONS[section](), key)
        said = tables[section].get(key, list(default) if isinstance(default, tuple) else default)
        assert (key, said) == (key, value)
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("kind", ["tdx", "snp"])
def test_katas_own_files_load(site: Site, kind: str) -> None:
    files = dict(line.split(" = ") for line in present(site, kind).splitlines())
    found = site.load(kata_template(site, KINDS[kind], files))
    assert found.config.hypervisor.confidential_guest
    assert found.config.agent.create_container_timeout == 60
    assert "turned off" not in "".join(found.warnings)


def test_every_key_of_protection_is_in_one_of_our_files() -> None:
    shown = {
        key
        for kind in KINDS
        for key in tomllib.loads((DEFAULTS / f"configuration-qemu-{kind}.toml").read_text())["hypervisor"][
            "qemu"
        ]
    }
    assert shown >= {
        "confidential_guest", "sev_snp_guest", "snp_id_block", "snp_id_auth", "snp_guest_policy",
        "tdx_quote_generation_service_socket_port", "initdata",
    }  # fmt: skip

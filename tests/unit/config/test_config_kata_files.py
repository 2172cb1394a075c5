"""Kata's own templates, of 3.26 and 4.1 and for every platform: they load, and each warning has its reason.

The files are made from the list of Kata's keys, with the values of the templates; what they name on the host is the
test's own.
"""

import re

import pytest

from config import LoadedConfig
from config.schema import SECTIONS, info
from tests.unit.config.config_site import VERITY, Site
from tests.unit.config.test_config_effects import kata_template

COLUMNS = ("plain_4_1", "plain_3_26", "tdx_4_1", "tdx_3_26", "snp_4_1", "snp_3_26", "se_4_1")
FILES = {
    "path": "qemu", "kernel": "kernel", "image": "image", "initrd": "initrd", "firmware": "firmware",
    "virtio_fs_daemon": "virtiofsd",
}  # fmt: skip
# What each file warns of. The pod's own control group is the host's affair.
GROUP = "runtime.sandbox_cgroup_only"
WARNED = {
    "plain_4_1": {GROUP},
    "plain_3_26": set[str](),
    "tdx_4_1": {GROUP},
    "tdx_3_26": set[str](),
    "snp_4_1": {GROUP},
    "snp_3_26": set[str](),
    "se_4_1": {
        GROUP,
        *("runtime.vfio_mode", "hypervisor.qemu.cold_plug_vfio", "hypervisor.qemu.disable_vhost_net"),
    },
}


def written(site: Site, column: str) -> str:
    """The template with the files that a host would have: everything that it names exists."""
    text = kata_template(site, column, {})
    for name in {*FILES.values(), "extension"}:
        (site.root / name).write_bytes(bytes(4096))
        (site.root / name).chmod(0o755)
    for key, name in FILES.items():
        text = re.sub(rf'(?m)^{key} = "/.*"$', f'{key} = "{site.root / name}"', text)
    return re.sub(r'(?m)^path = "/.*extension.*"$', f'path = "{site.root / "extension"}"', text)


def effect_of(key: str) -> str:
    header, _, name = key.rpartition(".")
    return info(SECTIONS[header], name).effect


def loaded(site: Site, column: str) -> LoadedConfig:
    return site.load(written(site, column))


@pytest.mark.parametrize("column", COLUMNS)
def test_it_loads_with_only_the_warnings_that_it_deserves(site: Site, column: str) -> None:
    found = loaded(site, column)
    told = {}
    for line in found.warnings:
        file, key, rest = line.split(": ", 2)
        assert file == str(site.file)
        told[key] = rest
    assert told.keys() == {key for key in WARNED[column] if effect_of(key) == "warned"}
    for key, rest in told.items():
        header, _, name = key.rpartition(".")
        assert rest.startswith(f"no effect in this version: {info(SECTIONS[header], name).why}")


@pytest.mark.parametrize("column", COLUMNS)
def test_it_is_the_guest_that_the_file_is_for(site: Site, column: str) -> None:
    qemu = loaded(site, column).config.hypervisor
    assert qemu.confidential_guest == (not column.startswith("plain"))
    assert qemu.sev_snp_guest == column.startswith("snp")
    assert qemu.machine_type == ("s390-ccw-virtio" if column.startswith("se") else "q35")
    assert qemu.kernel == str(site.root / "kernel")
    assert [image.name for image in qemu.guest_extension_images] == (
        ["coco"] if column in ("tdx_4_1", "snp_4_1", "se_4_1") else []
    )


def test_a_key_that_a_template_has_below_the_wrong_header(site: Site) -> None:
    """In the plain file of 3.26 the line stands after the header of the memory agent."""
    text = written(site, "plain_3_26")
    header = "[agent.kata.mem_agent]\n"
    assert header in text
    found = site.load(text.replace(header, f"{header}create_container_timeout = 60\n"))
    (line,) = found.warnings
    assert line == (
        f"{site.file}: agent.kata.mem_agent.create_container_timeout: no effect in this version: "
        "it belongs to [agent.kata] (move it up into [agent.kata])"
    )
    assert found.config.agent.create_container_timeout == 30


@pytest.mark.parametrize("column", COLUMNS)
def test_files_that_are_not_there_are_named_by_their_keys(site: Site, column: str) -> None:
    lines = site.lines(kata_template(site, column, {}))
    named = {line.removeprefix(f"{site.file}: ").split(": ")[0] for line in lines if "does not exist" in line}
    assert "hypervisor.qemu.kernel" in named
    assert all("does not exist" in line or "executable" in line for line in lines)


def test_an_image_with_hashes(site: Site) -> None:
    text = written(site, "plain_4_1").replace(
        "[hypervisor.qemu]\n", f"[hypervisor.qemu]\nkernel_verity_params = '{VERITY}'\n"
    )
    assert site.load(text).config.hypervisor.kernel_verity_params == VERITY

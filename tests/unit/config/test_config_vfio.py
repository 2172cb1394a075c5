"""Keys for devices of the host: which of them fit each other, and a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config import ConfigError, load
from tests.unit.config.config_site import HOST, Site

if TYPE_CHECKING:
    from pathlib import Path

SECRET = 'confidential_guest = true\nsev_snp_guest = true\nfirmware = "@/other"\n'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    (made.root / "other").touch()
    return made


def write(site: Site, lines: str) -> None:
    site.file.write_text(f"[hypervisor.qemu]\n{site.required()}{lines}\n".replace("@", str(site.root)))


@pytest.mark.parametrize(
    ("lines", "hot", "cold"),
    [
        ("", "no-port", "no-port"),
        ("hotplug_vfio_on_root_bus = true", "root-port", "no-port"),
        ('hotplug_vfio_on_root_bus = true\nhot_plug_vfio = "root-port"', "root-port", "no-port"),
        (
            'cold_plug_vfio = "root-port"\nhot_plug_vfio = "root-port"\npcie_root_port = 4',
            "root-port",
            "root-port",
        ),
        ('hot_plug_vfio = "switch-port"\npcie_switch_port = 16', "switch-port", "no-port"),
        ('hot_plug_vfio = "bridge-port"\npcie_root_port = 2', "bridge-port", "no-port"),
        ('machine_type = "s390-ccw-virtio"\ncold_plug_vfio = "root-port"', "no-port", "root-port"),
    ],
)
def test_what_fits(site: Site, lines: str, hot: str, cold: str) -> None:
    write(site, lines)
    loaded = load(site.file, env={}, host=HOST)
    assert (loaded.config.hypervisor.hot_plug_vfio, loaded.config.hypervisor.cold_plug_vfio) == (hot, cold)
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            'hotplug_vfio_on_root_bus = true\nhot_plug_vfio = "bridge-port"',
            "hypervisor.qemu.hotplug_vfio_on_root_bus: means hot_plug_vfio = ",
        ),
        (
            'cold_plug_vfio = "root-port"\nhot_plug_vfio = "switch-port"',
            "hypervisor.qemu.hot_plug_vfio: devices of the host are behind one kind of ports",
        ),
        (
            'hot_plug_vfio = "root-port"\npcie_switch_port = 1',
            "pcie_switch_port are different kinds of ports, and a machine has those of one (set pcie_switch_port to 0",
        ),
        (
            'cold_plug_vfio = "switch-port"\npcie_root_port = 1',
            "hypervisor.qemu.cold_plug_vfio: 'switch-port' and pcie_root_port are different kinds of ports",
        ),
        (
            'machine_type = "virt"\nhot_plug_vfio = "bridge-port"',
            "hypervisor.qemu.hot_plug_vfio: arm64 guests do not notice what is plugged in behind a bridge",
        ),
        ('hot_plug_vfio = "any-port"', "hypervisor.qemu.hot_plug_vfio: "),
    ],
)
def test_what_does_not(site: Site, lines: str, told: str) -> None:
    write(site, lines)
    with pytest.raises(ConfigError) as caught:
        load(site.file, env={}, host=HOST)
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ['hot_plug_vfio = "root-port"', "hotplug_vfio_on_root_bus = true"])
def test_confidential_guests_start_with_their_devices(site: Site, key: str) -> None:
    write(site, f'{SECRET}shared_fs = "none"\ncold_plug_vfio = "switch-port"\n{key}')
    loaded = load(site.file, env={}, host=HOST)
    assert loaded.config.hypervisor.hot_plug_vfio == "no-port"
    (line,) = (line for line in loaded.warnings if key.partition(" ")[0] in line)
    assert "turned off for a confidential guest: it takes only the devices that it starts with" in line

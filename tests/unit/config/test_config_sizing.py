"""Static sizing: a machine as large as its pod's limits."""

import pytest

from config import ConfigError, LoadedConfig, PodResources, load
from tests.unit.config.config_site import HOST, Site

GIB = 2**30
STATIC = "[runtime]\nstatic_sandbox_resource_mgmt = true\n"


def sized(site: Site, resources: PodResources, qemu: str = "", runtime: str = STATIC) -> LoadedConfig:
    site.file.write_text(f"[hypervisor.qemu]\n{site.required()}{qemu}{runtime}")
    return load(site.file, env={}, host=HOST, resources=resources)


@pytest.mark.parametrize(
    ("resources", "qemu", "vcpus", "memory"),
    [
        (PodResources(), "", (1.0, 1), (2048, HOST.memory_mib)),
        (PodResources(), "default_vcpus = 1.5\n", (1.5, 2), (2048, HOST.memory_mib)),
        (PodResources(200_000, 100_000), "", (2.0, 2), (2048, HOST.memory_mib)),
        (PodResources(200_001, 100_000), "", (3.0, 3), (2048, HOST.memory_mib)),
        (PodResources(10_000, 100_000, GIB), "overhead_vcpus = 0.2\n", (1.2, 2), (1024, 1024)),
        (PodResources(-1, 100_000, GIB + 1), "overhead_memory = 32\n", (1.0, 1), (1058, 1058)),
        (PodResources(200_000, 0, -1), "", (1.0, 1), (2048, HOST.memory_mib)),
        (PodResources(10**12, 1, 2**62), "", (8.0, 8), (HOST.memory_mib, HOST.memory_mib)),
    ],
)
def test_sizes(
    site: Site, resources: PodResources, qemu: str, vcpus: tuple[float, int], memory: tuple[int, int]
) -> None:
    found = sized(site, resources, qemu)
    hypervisor = found.config.hypervisor
    assert (hypervisor.default_vcpus, hypervisor.default_maxvcpus) == vcpus
    assert (hypervisor.default_memory, hypervisor.default_maxmemory) == memory
    assert found.origins["hypervisor.qemu.default_maxvcpus"] == "CRI sizing"
    assert (found.origins.get("hypervisor.qemu.default_memory") == "CRI sizing") == (
        resources.memory_bytes > 0
    )


def test_without_static_sizing_limits_change_nothing(site: Site) -> None:
    resources = PodResources(200_000, 100_000, GIB)
    assert sized(site, resources, runtime="") == sized(site, PodResources(), runtime="")


def test_a_limit_that_no_guest_boots_with(site: Site) -> None:
    with pytest.raises(
        ConfigError, match=r"CRI sizing: hypervisor\.qemu\.default_memory: 16 MiB is too little"
    ):
        sized(site, PodResources(memory_bytes=16 * 2**20))

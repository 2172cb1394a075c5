"""Every annotation sets its key, is named in a warning, or is refused by name; none is dropped."""

import base64
from pathlib import Path

import pytest

from config import ConfigError
from config.annotation_rules import RULES
from config.annotations import is_ours
from config.schema import SharedMount
from tests.unit.config.config_site import VERITY, Site

HYPERVISOR = "io.katacontainers.config.hypervisor."
RUNTIME = "io.katacontainers.config.runtime."
AGENT = "io.katacontainers.config.agent."

KNOWN = [
    line
    for line in (Path(__file__).parent / "data" / "annotations.txt").read_text().splitlines()
    if not line.startswith("#")
]

# What is set, and the key with its value afterwards. A path begins with "@/" for the folder of the installation.
SETS: dict[str, tuple[str, str, object]] = {
    HYPERVISOR + name: (text, key or f"hypervisor.{name}", value)
    for name, text, key, value in (
        ("path", "@/qemu", "", "@/qemu"),
        ("enable_iothreads", "true", "", True),
        ("indep_iothreads", "2", "", 2),
        ("block_device_driver", "virtio-scsi", "", "virtio-scsi"),
        ("disable_block_device_use", "true", "", True),
        ("blk_logical_sector_size", "512", "hypervisor.block_device_logical_sector_size", 512),
        ("blk_physical_sector_size", "4096", "hypervisor.block_device_physical_sector_size", 4096),
        ("block_device_cache_set", " true ", "", True),
        ("block_device_cache_direct", "true", "", True),
        ("block_device_cache_noflush", "true", "", True),
        ("block_device_aio", "native", "", "native"),
        ("block_device_num_queues", "4", "hypervisor.num_queues", 4),
        ("block_device_queue_size", "64", "hypervisor.queue_size", 64),
        ("disable_image_nvdimm", "true", "", True),
        ("kernel_verity_params", VERITY, "", VERITY),
        ("firmware_volume", "@/other", "", "@/other"),
        ("rootless", "true", "", True),
        ("pcie_root_port", "16", "", 16),
        ("pcie_switch_port", "1", "", 1),
        ("cold_plug_vfio", "root-port", "", "root-port"),
        ("hot_plug_vfio", "switch-port", "", "switch-port"),
        ("hotplug_vfio_on_root_bus", "true", "hypervisor.hot_plug_vfio", "root-port"),
        ("enable_iommu", "true", "", True),
        ("disable_vhost_net", "true", "", True),
        ("network_queues", "2", "", 2),
        ("rx_rate_limiter_max_rate", "5", "", 5),
        ("tx_rate_limiter_max_rate", "6", "", 6),
        ("enable_virtio_mem", "true", "", True),
        ("reclaim_guest_freed_memory", "true", "", True),
        ("enable_mem_prealloc", "true", "", True),
        ("enable_hugepages", "true", "", True),
        ("file_mem_backend", "/dev/shm", "", "/dev/shm"),
        ("memory_offset", "16", "", 16),
        ("numa_mapping", "0 1,2-3", "", ("0", "1,2-3")),
        ("enable_vhost_user_store", "true", "", True),
        ("enable_guest_swap", "true", "", True),
        ("vhost_user_store_path", "@/", "", "@/"),
        ("vhost_user_reconnect_timeout_sec", "3", "", 3),
        ("kernel", "@/other", "", "@/other"),
        ("kernel_params", "a=2 c", "", "b a=2 c"),
        ("image", "@/other", "", "@/other"),
        ("initrd", "@/other", "", "@/other"),
        ("firmware", "@/other", "", "@/other"),
        ("cpu_features", "pmu=off", "", "pmu=off"),
        ("default_vcpus", "1.5", "", 1.5),
        ("default_max_vcpus", "3", "hypervisor.default_maxvcpus", 3),
        ("machine_type", "q35", "", "q35"),
        ("machine_accelerators", "a=b", "", "a=b"),
        ("entropy_source", "/dev/zero", "", "/dev/zero"),
        ("default_memory", "512", "", 512),
        ("memory_slots", "8", "", 8),
        ("hugepage_type", "thp", "", "thp"),
        ("shared_fs", "none", "", "none"),
        ("virtio_fs_daemon", "@/other", "", "@/other"),
        ("virtio_fs_cache", "always", "", "always"),
        ("virtio_fs_cache_size", "512", "", 512),
        ("virtio_fs_extra_args", "-o,a=b", "", ("--first", "-o", "a=b")),
        ("msize_9p", "4096", "", 4096),
        ("use_legacy_serial", "true", "", True),
        ("prefetch_files.list", "/list", "hypervisor.prefetch_list_path", "/list"),
        ("default_gpus", "1", "", 1),
        ("default_gpu_model", "x", "", "x"),
        ("guest_hook_path", "/hooks", "", "/hooks"),
    )
} | {
    RUNTIME + "name": ("virt-container", "runtime.name", "virt_container"),
    RUNTIME + "hypervisor_name": ("qemu", "runtime.hypervisor_name", "qemu"),
    RUNTIME + "agent_name": ("kata", "runtime.agent_name", "kata"),
    RUNTIME + "internetworking_model": ("none", "runtime.internetworking_model", "none"),
    RUNTIME + "sandbox_cgroup_only": ("true", "runtime.sandbox_cgroup_only", True),
    RUNTIME + "enable_vcpus_pinning": ("true", "runtime.enable_vcpus_pinning", True),
    "io.katacontainers.enable_vcpus_pinning": ("true", "runtime.enable_vcpus_pinning", True),
    RUNTIME + "vfio_mode": ("vfio", "runtime.vfio_mode", "vfio"),
    RUNTIME + "disable_new_netns": ("true", "runtime.disable_new_netns", True),
    RUNTIME + "disable_guest_seccomp": ("true", "runtime.disable_guest_seccomp", True),
    RUNTIME + "disable_guest_empty_dir": ("true", "runtime.disable_guest_empty_dir", True),
    RUNTIME + "shared_mounts": (
        '[{"name": "n", "src_ctr": "a", "src_path": "/a", "dst_ctr": "b", "dst_path": "/b"}]',
        "runtime.shared_mounts",
        (SharedMount(name="n", src_ctr="a", src_path="/a", dst_ctr="b", dst_path="/b"),),
    ),
    RUNTIME + "create_container_timeout": ("90", "agent.create_container_timeout", 90),
    AGENT + "kernel_modules": ("loop a=1; dummy", "agent.kernel_modules", ("loop a=1", "dummy")),
    AGENT + "container_pipe_size": ("8192", "agent.container_pipe_size", 8192),
    AGENT + "enable_tracing": ("true", "agent.enable_tracing", True),
    AGENT + "cdh_api_timeout_ms": ("7", "agent.cdh_api_timeout_ms", 7),
    AGENT + "cdh_api_timeout": ("7", "agent.cdh_api_timeout_ms", 7000),
    AGENT + "policy": (base64.b64encode(b"package a\n").decode(), "agent.policy", "package a\n"),
}

# What makes sense only together with another one.
WITH = {
    HYPERVISOR + "kernel_verity_params": {HYPERVISOR + "image": "@/other"},
    HYPERVISOR + "enable_vhost_user_store": {HYPERVISOR + "vhost_user_store_path": "@/"},
}

# Accepted with a warning that names the key.
WARNS: dict[str, tuple[str, str]] = {
    RUNTIME + name: (text, f"runtime.{name}")
    for name, text in {
        "enable_pprof": "true",
    }.items()
}

REFUSED: dict[str, str] = {
    HYPERVISOR + "jailer_path": "/bin/true",
    HYPERVISOR + "use_vsock": "true",
    HYPERVISOR + "enable_iommu_platform": "true",  # on this machine
    HYPERVISOR + "cc_init_data": "eA==",
    RUNTIME + "experimental": "a,b",
    RUNTIME + "guest_selinux_label": "x",
    RUNTIME + "sandbox_bind_mounts": "/etc",
    RUNTIME + "experimental_force_guest_pull": "true",
    "io.katacontainers.config_path": "/etc/passwd",
} | {name: "sha512" for name in KNOWN if name.endswith(("_hash", "asset_hash_type"))}

MOUNT_OPTIONS = ("io.katacontainers.volume", "io.katacontainers.fs-opt.")
CONFIGURED = [name for name in KNOWN if is_ours(name) and not name.startswith(MOUNT_OPTIONS)]

FILES = """\
enable_annotations = [".*"]
valid_hypervisor_paths = ["@/q*"]
valid_virtio_fs_daemon_paths = ["@/o*"]
valid_vhost_user_store_paths = ["@/"]
valid_entropy_sources = ["/dev/zero"]
valid_file_mem_backends = ["/dev/shm"]
firmware = "/dev/null"
kernel_params = "a=1 b"
virtio_fs_extra_args = ["--first"]
"""


@pytest.fixture
def pod_site(site: Site) -> Site:
    (site.root / "other").write_bytes(b"x")
    (site.root / "other").chmod(0o755)
    return site


def here(site: Site, value: object) -> object:
    return value.replace("@", str(site.root)) if isinstance(value, str) else value


def files(site: Site) -> str:
    return FILES.replace("@", str(site.root))


def problems(site: Site, annotations: dict[str, str], text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        site.annotated(annotations, text)
    return str(caught.value).splitlines()


def test_every_known_annotation_has_a_case() -> None:
    cases = [*SETS, *WARNS, *REFUSED]
    assert sorted(cases) == sorted(CONFIGURED)
    assert set(cases) == set(RULES)


@pytest.mark.parametrize("name", SETS)
def test_it_sets_its_key(pod_site: Site, name: str) -> None:
    text, key, value = SETS[name]
    asked = {name: text} | WITH.get(name, {})
    found = pod_site.annotated(
        {each: str(here(pod_site, text)) for each, text in asked.items()}, files(pod_site)
    )
    section, _, attribute = key.partition(".")
    assert getattr(getattr(found.config, section), attribute) == here(pod_site, value)
    assert found.warnings == ()


@pytest.mark.parametrize("name", WARNS)
def test_it_is_named_in_a_warning(pod_site: Site, name: str) -> None:
    text, key = WARNS[name]
    (warning,) = pod_site.annotated({name: text}, files(pod_site)).warnings
    assert warning.startswith(f"annotation {name}: {key}: no effect in this version: ")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(pod_site: Site, name: str) -> None:
    (line,) = problems(pod_site, {name: REFUSED[name]}, files(pod_site))
    assert line.startswith(f"annotation {name}: ")
    assert line.endswith(")")  # what to do instead


@pytest.mark.parametrize("name", sorted(set(KNOWN) - set(CONFIGURED)))
def test_annotations_of_others_change_nothing(site: Site, name: str) -> None:
    if name.startswith(MOUNT_OPTIONS):  # no annotation of pods
        (line,) = problems(site, {name: "1"}, "")
        assert line == f"annotation {name}: unknown annotation (remove it)"
    else:
        assert site.annotated({name: "1"}) == site.annotated({})


@pytest.mark.parametrize(
    "name", [name for name in RULES if name.startswith(HYPERVISOR) and not RULES[name].refused]
)
def test_the_gate(pod_site: Site, name: str) -> None:
    key = name.removeprefix(HYPERVISOR)
    text = str(here(pod_site, SETS[name][0] if name in SETS else WARNS.get(name, ("x",))[0]))
    others = files(pod_site).replace('".*"', f'"x{key}", "{key}x", "{key[:-1]}", "{key[1:]}"')
    refusal = f'pods may not set it (add "{key}" to enable_annotations of [hypervisor.qemu])'
    assert problems(pod_site, {name: text}, others) == [f"annotation {name}: {refusal}"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("default_vcpus", "257", "want a number up to 256, got '257'"),
        ("default_vcpus", "nan", "want number, got 'nan'"),
        ("default_vcpus", "1e3", "want number, got '1e3'"),
        ("default_max_vcpus", "-1", "hypervisor.qemu.default_maxvcpus: want int 0..4294967295, got -1"),
        ("default_max_vcpus", "0x10", "want int 0..4294967295, got '0x10'"),
        ("pcie_root_port", "17", "want a number up to 16, got '17'"),
        ("default_memory", "63", "want at least 64 MiB, got '63'"),
        ("default_memory", "2Qi", "want a number of MiB, or with a unit as in 2Gi, got '2Qi'"),
        ("enable_iommu", "True", "want bool, got 'True'"),
        ("enable_iommu", "", "want bool, got ''"),
        ("machine_type", "pc", "hypervisor.qemu.machine_type: want one of q35, virt, s390-ccw-virtio, got"),
        ("kernel", "/nonexistent", "hypervisor.qemu.kernel: /nonexistent does not exist"),
        (
            "cpu_features",
            "a\nb",
            r"hypervisor.qemu.cpu_features: want printable text on one line, got 'a\nb'",
        ),
        ("virtio_fs_extra_args", "[1", "want a JSON array, got '[1'"),
        ("virtio_fs_extra_args", "[1]", "hypervisor.qemu.virtio_fs_extra_args[1]: want string, got 1"),
        ("path", "/bin/sh", "'/bin/sh' is not a path that pods may name"),
        ("path", "@/./qemu", "'@/"),
        ("defualt_memory", "1", "unknown annotation (did you mean"),
        ("enable_annotations", "x", "unknown annotation"),
        ("valid_hypervisor_paths", "x", "unknown annotation"),
    ],
)
def test_wrong_values(pod_site: Site, name: str, text: str, problem: str) -> None:
    (line,) = problems(pod_site, {HYPERVISOR + name: str(here(pod_site, text))}, files(pod_site))
    assert line.startswith(f"annotation {HYPERVISOR}{name}: {here(pod_site, problem)}")


@pytest.mark.parametrize(
    ("text", "mib"), [("2Gi", 2048), ("2GiB", 2048), ("512MB", 488), (" 134217728B", 128), ("1 Gi", 1024)]
)
def test_memory_with_a_unit(site: Site, text: str, mib: int) -> None:
    assert site.annotated({f"{HYPERVISOR}default_memory": text}).config.hypervisor.default_memory == mib


def test_all_problems_are_told_at_once(site: Site) -> None:
    asked = {f"{HYPERVISOR}{name}": "?" for name in ("default_vcpus", "path", "machine_type", "surprise")}
    lines = problems(site, {**asked, "other": "?"}, 'enable_annotations = ["default_vcpus|machine_type"]\n')
    assert [line.split(": ")[0].rpartition(".")[2] for line in lines] == [
        "default_vcpus", "path", "surprise", "machine_type",
    ]  # fmt: skip


def test_an_image_takes_the_place_of_the_initrd(pod_site: Site) -> None:
    found = pod_site.annotated({f"{HYPERVISOR}image": str(pod_site.root / "other")}).config.hypervisor
    assert (found.image, found.initrd) == (str(pod_site.root / "other"), "")
    both = {f"{HYPERVISOR}{name}": str(pod_site.root / "other") for name in ("image", "initrd")}
    (line,) = problems(pod_site, both, 'enable_annotations = [".*"]\n')
    assert "an image or an initrd, not both" in line


@pytest.mark.parametrize(("name", "kept"), [("image", True), ("initrd", False)])
def test_the_small_initrd_goes_with_the_image(pod_site: Site, name: str, kept: bool) -> None:
    other = str(pod_site.root / "other")
    files = pod_site.required().replace("initrd =", "image =")
    text = f"[hypervisor.qemu]\n{files}image_initrd = '{other}'\nenable_annotations = ['.*']\n"
    found = pod_site.load(text, annotations={f"{HYPERVISOR}{name}": other}).config.hypervisor
    assert found.image_initrd == (other if kept else "")


def test_a_pattern_that_a_later_python_may_read_in_another_way_is_one(site: Site) -> None:
    """Python warns of it, which is an error in tests, and a stray line in a log elsewhere."""
    assert site.problems('enable_annotations = ["[[a]", "[["]\n') == [
        "hypervisor.qemu.enable_annotations[1]: '[[' is not a regular expression"
    ]


def test_a_broken_pattern_is_a_mistake_of_the_file(site: Site) -> None:
    assert site.problems('enable_annotations = ["path", "("]\n') == [
        "hypervisor.qemu.enable_annotations[1]: '(' is not a regular expression"
    ]


def test_an_empty_list_of_paths_allows_none(pod_site: Site) -> None:
    asked = {f"{HYPERVISOR}path": str(pod_site.root / "qemu")}
    (line,) = problems(pod_site, asked, 'enable_annotations = ["path"]\n')
    assert line.endswith("(add it to valid_hypervisor_paths of [hypervisor.qemu])")

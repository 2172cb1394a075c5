"""The annotations of pods that concern the configuration: which key each sets, and how its text becomes a value."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from config.describe import unwrap, wanted
from config.schema import ANNOTATION_PREFIX as PREFIX
from config.tree import KeyPath

HYPERVISOR = f"{PREFIX}config.hypervisor."
_RUNTIME = f"{PREFIX}config.runtime."
_AGENT = f"{PREFIX}config.agent."

# The bounds that only annotations have.
_MAX_VCPUS = 256
_MAX_PORTS = 16
_MIN_MEMORY_MIB = 64
_UNITS = {"": 2**20, "B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("i", 1024), ("iB", 1024), ("", 1000), ("B", 1000))
}


class Rule(NamedTuple):
    """What one annotation does.

    It sets the key at `where`, to what `parse` makes of its text (None: what the key's type says) and of the key's
    value so far; `paths` is the key with the patterns that its text must be found by. With `refused` it does nothing:
    that is why, and what to do.
    """

    where: KeyPath = ()
    parse: Callable[[str, Any], object] | None = None
    paths: str = ""
    refused: str = ""


def value_of(kind: Any, text: str) -> object:
    """A value of the key's type; its bounds are checked with those of all keys. Raises `ValueError`: what is wanted."""
    inner = unwrap(kind)[0]
    if get_origin(inner) is Literal:
        inner = type(get_args(inner)[0])
    if inner is str:
        return text
    text = text.strip()
    if inner is bool and text in ("true", "false"):
        return text == "true"
    if inner is int and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    if inner is float and re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", text):
        return float(text)
    raise ValueError(wanted(kind))


def _at_most(most: int) -> Callable[[str, Any], object]:
    def parse(text: str, so_far: Any) -> object:
        number = value_of(type(so_far), text)
        if not isinstance(number, int | float) or number > most:
            raise ValueError(f"a number up to {most}")
        return number

    return parse


def _memory(text: str, _: Any) -> object:
    match = re.fullmatch(r"([0-9]{1,20}) ?([A-Za-z]{0,3})", text.strip())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError("a number of MiB, or with a unit as in 2Gi")
    mib = round(int(match[1]) * unit / 2**20)
    if mib < _MIN_MEMORY_MIB:
        raise ValueError(f"at least {_MIN_MEMORY_MIB} MiB")
    return mib


def _words(text: str, so_far: str) -> object:
    """Kernel parameters: those of the same name are replaced, the others follow."""
    replaced = {word.partition("=")[0] for word in text.split()}
    kept = [word for word in so_far.split() if word.partition("=")[0] not in replaced]
    return " ".join([*kept, *text.split()])


def _appended(separator: str) -> Callable[[str, Any], object]:
    def parse(text: str, so_far: tuple[str, ...]) -> object:
        return [*so_far, *filter(None, (part.strip() for part in text.split(separator)))]

    return parse


def _arguments(text: str, so_far: tuple[str, ...]) -> object:
    """Arguments of virtiofsd: a JSON array of strings, or a list with commas; both are in use."""
    if not text.lstrip().startswith("["):
        return _appended(",")(text, so_far)
    return [*so_far, *_json_array(text)]


def _nodes(text: str, _: Any) -> object:
    """NUMA nodes: separated by spaces, since the list of each has commas, or a JSON array."""
    return _json_array(text) if text.lstrip().startswith("[") else text.split()


def _json_array(text: str, _: Any = None) -> list[Any]:
    import json

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError("a JSON array")
    return found


def _rego(text: str, _: Any) -> object:
    import base64

    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError:
        raise ValueError("base64 of the policy's text") from None


def _seconds_as_ms(text: str, _: Any) -> object:
    seconds = value_of(int, text)
    assert isinstance(seconds, int)
    return seconds * 1000


# Those of the machine that set the key of the same name, by its type.
_SAME = (
    "enable_iothreads",
    "indep_iothreads",
    "block_device_driver",
    "disable_block_device_use",
    "block_device_cache_set",
    "block_device_cache_direct",
    "block_device_cache_noflush",
    "block_device_aio",
    "disable_image_nvdimm",
    "memory_offset",
    "enable_vhost_user_store",
    "vhost_user_reconnect_timeout_sec",
    "kernel",
    "kernel_verity_params",
    "image",
    "initrd",
    "firmware",
    "firmware_volume",
    "cpu_features",
    "cold_plug_vfio",
    "hot_plug_vfio",
    "hotplug_vfio_on_root_bus",
    "enable_iommu",
    "enable_iommu_platform",
    "machine_type",
    "machine_accelerators",
    "memory_slots",
    "enable_mem_prealloc",
    "enable_hugepages",
    "hugepage_type",
    "enable_virtio_mem",
    "reclaim_guest_freed_memory",
    "enable_guest_swap",
    "disable_vhost_net",
    "rx_rate_limiter_max_rate",
    "tx_rate_limiter_max_rate",
    "network_queues",
    "guest_hook_path",
    "rootless",
    "shared_fs",
    "virtio_fs_cache",
    "virtio_fs_cache_size",
    "msize_9p",
    "use_legacy_serial",
    "default_gpus",
    "default_gpu_model",
)
_RENAMED = {
    "block_device_num_queues": "num_queues",
    "block_device_queue_size": "queue_size",
    "blk_logical_sector_size": "block_device_logical_sector_size",
    "blk_physical_sector_size": "block_device_physical_sector_size",
    "default_max_vcpus": "default_maxvcpus",
    "cc_init_data": "initdata",
    "prefetch_files.list": "prefetch_list_path",
}
_PATHS = {
    "path": "valid_hypervisor_paths",
    "jailer_path": "valid_jailer_paths",
    "virtio_fs_daemon": "valid_virtio_fs_daemon_paths",
    "vhost_user_store_path": "valid_vhost_user_store_paths",
    "entropy_source": "valid_entropy_sources",
    "file_mem_backend": "valid_file_mem_backends",
}
_PARSED: dict[str, Callable[[str, Any], object]] = {
    "kernel_params": _words,
    "default_vcpus": _at_most(_MAX_VCPUS),
    "pcie_root_port": _at_most(_MAX_PORTS),
    "pcie_switch_port": _at_most(_MAX_PORTS),
    "default_memory": _memory,
    "virtio_fs_extra_args": _arguments,
    "numa_mapping": _nodes,
}
_HASHES = (
    "path_hash",
    "hypervisor_hash",
    "jailer_hash",
    "asset_hash_type",
    "kernel_hash",
    "image_hash",
    "initrd_hash",
    "firmware_hash",
    "firmware_volume_hash",
)
_NO_HASH = "files are not compared with digests; name the file that is wanted in the configuration"
_RUNTIME_SAME = (
    "hypervisor_name",
    "agent_name",
    "disable_guest_seccomp",
    "enable_pprof",
    "internetworking_model",
    "sandbox_cgroup_only",
    "enable_vcpus_pinning",
    "disable_new_netns",
    "vfio_mode",
    "disable_guest_empty_dir",
    "guest_selinux_label",
)


def _qemu(key: str) -> KeyPath:
    return ("hypervisor", "qemu", key)


RULES: Mapping[str, Rule] = MappingProxyType(
    {HYPERVISOR + key: Rule(_qemu(key)) for key in _SAME}
    | {HYPERVISOR + name: Rule(_qemu(key)) for name, key in _RENAMED.items()}
    | {HYPERVISOR + key: Rule(_qemu(key), paths=paths) for key, paths in _PATHS.items()}
    | {HYPERVISOR + key: Rule(_qemu(key), parse) for key, parse in _PARSED.items()}
    | {HYPERVISOR + name: Rule(refused=_NO_HASH) for name in _HASHES}
    | {_RUNTIME + key: Rule(("runtime", key)) for key in _RUNTIME_SAME}
    | {
        f"{HYPERVISOR}use_vsock": Rule(refused="the guest is always reached over vsock; remove it"),
        f"{_RUNTIME}name": Rule(("runtime", "name"), lambda text, _: text.replace("-", "_")),
        f"{_RUNTIME}experimental": Rule(("runtime", "experimental"), _appended(",")),
        f"{_RUNTIME}shared_mounts": Rule(("runtime", "shared_mounts"), _json_array),
        f"{_RUNTIME}create_container_timeout": Rule(("agent", "kata", "create_container_timeout")),
        f"{_RUNTIME}sandbox_bind_mounts": Rule(
            refused="a pod cannot choose directories of the host; set sandbox_bind_mounts in [runtime]"
        ),
        f"{_RUNTIME}experimental_force_guest_pull": Rule(refused="images are pulled on the host; remove it"),
        f"{_AGENT}kernel_modules": Rule(("agent", "kata", "kernel_modules"), _appended(";")),
        f"{_AGENT}enable_tracing": Rule(("agent", "kata", "enable_tracing")),
        f"{_AGENT}container_pipe_size": Rule(("agent", "kata", "container_pipe_size")),
        f"{_AGENT}cdh_api_timeout_ms": Rule(("agent", "kata", "cdh_api_timeout_ms")),
        f"{_AGENT}cdh_api_timeout": Rule(("agent", "kata", "cdh_api_timeout_ms"), _seconds_as_ms),
        f"{_AGENT}policy": Rule(("agent", "kata", "policy"), _rego),
        f"{PREFIX}config_path": Rule(
            refused="a pod cannot choose a file of the host; name it as ConfigPath in the runtime's options"
        ),
        f"{PREFIX}enable_vcpus_pinning": Rule(("runtime", "enable_vcpus_pinning")),
        f"{PREFIX}asset_hash_type": Rule(refused=_NO_HASH),
    }
)
"""Every annotation that concerns the configuration, by its full name."""

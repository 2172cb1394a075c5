"""A folder with a guest in it and a way to load what a test writes there."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from config import ConfigError, HostLimits, LoadedConfig, load

VERITY = f"root_hash={'4f' * 32},salt=a0,data_blocks=8,data_block_size=4096,hash_block_size=4096"
HOST = HostLimits(cpus=8, memory_mib=16384)


class Site:
    """An installation: programs and guest files that exist, and the configuration file of the test."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.file = self.root / "configuration.toml"
        for name in ("qemu", "kernel", "initrd", "virtiofsd"):
            (self.root / name).touch(mode=0o755)

    def required(self) -> str:
        """The lines of [hypervisor.qemu] that name files which exist."""
        names = {"path": "qemu", "kernel": "kernel", "initrd": "initrd", "virtio_fs_daemon": "virtiofsd"}
        return "".join(f'{key} = "{self.root / name}"\n' for key, name in names.items())

    def drop_in(self, name: str, text: str) -> Path:
        """Write one file into config.d."""
        file = self.root / "config.d" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    def load(
        self, text: str, host: HostLimits = HOST, annotations: Mapping[str, str] | None = None
    ) -> LoadedConfig:
        """Load exactly this text."""
        self.file.write_text(text)
        return load(self.file, env={}, host=host, annotations=annotations)

    def annotated(
        self, annotations: Mapping[str, str], text: str = 'enable_annotations = [".*"]\n'
    ) -> LoadedConfig:
        """Load a pod's annotations over these keys of [hypervisor.qemu] and those that name the guest's files."""
        return self.load(f"[hypervisor.qemu]\n{self.required()}{text}", annotations=annotations)

    def qemu(self, text: str, host: HostLimits = HOST) -> LoadedConfig:
        """Load these keys of [hypervisor.qemu] over the ones that name the guest's files."""
        self.drop_in("00-files.toml", "[hypervisor.qemu]\n" + self.required())
        self.drop_in("50-test.toml", "[hypervisor.qemu]\n" + text)
        return self.load("", host)

    def lines(self, text: str) -> list[str]:
        """The problems of this text, which names no guest files unless it does so itself."""
        with pytest.raises(ConfigError) as caught:
            self.load(text)
        return str(caught.value).splitlines()

    def problems(self, text: str) -> list[str]:
        """The problems of these keys of [hypervisor.qemu], without the name of the file."""
        with pytest.raises(ConfigError) as caught:
            self.qemu(text)
        return [f"{problem.key}: {problem.problem}" for problem in caught.value.problems]

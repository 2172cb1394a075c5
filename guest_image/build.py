"""The order of a build: packages, kernel, Python, tree, files. Each step tells what it does.

Nothing is done when nothing changed: the manifest of the last build carries a digest of what it was made from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import stat
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import google.protobuf

from guest_image import kernel, root_image
from guest_image.apt import Apt
from guest_image.contents import DATA_DIR, Contents
from guest_image.cpio import Tree
from guest_image.errors import ImageError
from guest_image.foreign import for_architecture
from guest_image.manifest import FILE_NAME, IMAGE, IMAGE_INITRD, INITRD, VMLINUX, Manifest
from guest_image.python_set import AGENT_PACKAGES, GuestPython, modules_of
from guest_image.tools import host_arch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest_image.apt import Package
    from guest_image.file_systems import FileSystem
    from guest_image.tools import Root

#: The directory that holds our packages: of the source tree, or of an installation.
PACKAGES_DIR = Path(__file__).parent.parent
KERNEL_PACKAGES = {
    "amd64": "linux-image-cloud-amd64",
    "arm64": "linux-image-cloud-arm64",
    "s390x": "linux-image-s390x",
}
#: What the agent loads before it listens, then what it loads when a storage or a device asks for it.
KERNEL_MODULES = (
    *("virtio_pci", "vmw_vsock_virtio_transport"),
    *("virtiofs", "overlay", "virtio_blk", "virtio_net"),
    *("virtio_balloon", "virtio_rng"),
)
#: What few guests load and much memory would go to: it is in the image compressed. File systems and buses of disks that
#: the host plugs in, devices that containers ask for.
SELDOM_MODULES = ("ext4", "xfs", "erofs", "virtio_scsi", "sd_mod", "tun", *("dm_crypt", "xts", "ecb"))
#: Of these each architecture has one: encryption by the processor's own instructions.
SELDOM_SOME_MODULES = ("aesni_intel", "aes_ce_blk", "aes_s390")
#: Makes the file systems of disks that only the guest can read.
SELDOM_PROGRAM = ("usr/sbin/mke2fs", "sbin/mke2fs")
#: And what it loads where the host's byte order may be another one, which virtiofs does not bridge.
BIG_ENDIAN_MODULES = ("9pnet_virtio", "9p")
#: The same, of kernels that have them: before Linux 6.13 there is no virtio-mem on s390x.
#: On s390x the second drives crypto adapters of the host.
SOME_KERNELS_MODULES = ("virtio_mem", "zcrypt_cex4")
#: The engine makes system call filters with it.
SECCOMP_LIBRARY = "libseccomp.so.2"
#: For programs of containers that drive PCI devices of the host themselves.
VFIO_MODULES = ("vfio_pci", "vfio_iommu_type1")


@dataclass(frozen=True)
class _Sources:
    """The unpacked packages: of the guest, and of programs this machine runs during the build."""

    packages: list[Package]
    guest: Root
    kernel: Root
    tools: Root


def build(
    output: Path,
    *,
    arch: str = "amd64",
    progress: Callable[[str], None],
    suite: str | None = None,
    image: FileSystem | None = None,
    verity: bool = False,
) -> Manifest:
    """Make `vmlinux`, `initrd.img` and `manifest.json` in `output`, without root, from Debian packages.

    `image` adds the same guest as a root image with that file system, `rootfs.img`, and its `image-initrd.img`;
    `verity` adds hashes to it. `suite` chooses another Debian suite than the machine's. Downloads are kept in the
    user's cache directory. When nothing changed since the last build into `output`, it is kept. Raises ImageError.
    """
    if arch not in KERNEL_PACKAGES:
        raise ImageError(f"no guest image for architecture {arch!r}: known are {', '.join(KERNEL_PACKAGES)}")
    root_image.check(image, arch, verity=verity)
    inputs = _inputs_digest(arch, suite)
    known = _up_to_date(output, inputs, image, verity)
    if known is not None:
        progress(f"guest image in {output} is up to date")
        return known
    sources = _sources(arch, suite, progress)
    guest = _Image(sources, arch, progress)
    progress("unpacking the kernel")
    vmlinux = guest.vmlinux()
    progress("collecting and compiling Python modules")
    guest.fill()
    progress("writing the initrd")
    initrd, manifest = guest.finish(len(vmlinux), inputs)
    files = {VMLINUX: vmlinux, INITRD: initrd}
    if image is not None:
        tools, programs = _image_sources(arch, suite, progress)
        progress("writing the root image")
        made = guest.root_image(image, verity=verity, tools=tools, programs=programs)
        files |= {IMAGE: made.disk, IMAGE_INITRD: made.initrd}
        manifest = replace(
            manifest,
            rootfs_type=image,
            image_bytes=len(made.disk),
            image_initrd_bytes=len(made.initrd),
            kernel_verity_params=made.verity,
        )
    output.mkdir(parents=True, exist_ok=True)
    root_image.check_room(output, sum(map(len, files.values())))
    for name in {IMAGE, IMAGE_INITRD} - files.keys():
        (output / name).unlink(missing_ok=True)  # of an earlier build, and another kernel's
    for name, data in {**files, FILE_NAME: manifest.to_json().encode()}.items():
        _replace(output / name, data)
    return manifest


class _Image:
    """One image in the making."""

    def __init__(self, sources: _Sources, arch: str, progress: Callable[[str], None]) -> None:
        self._sources = sources
        self._arch = arch
        self._progress = progress
        self._python = GuestPython(sources.tools if arch != host_arch() else sources.guest)
        self._contents = Contents(Tree(), sources.guest)
        modules = sorted((sources.kernel.path / "lib/modules").glob("*")) or sorted(
            (sources.kernel.path / "usr/lib/modules").glob("*")
        )
        if len(modules) != 1:
            raise ImageError(f"expected one kernel in the unpacked package, found {len(modules)}")
        self._modules_dir = kernel.ModuleDirectory(modules[0])
        self._python_modules = 0
        self._module_names: list[str] = []

    def vmlinux(self) -> bytes:
        path = self._sources.kernel.find(f"boot/vmlinuz-{self._modules_dir.release}")
        data = path.read_bytes()
        return kernel.vmlinux(data, path.name, self._sources.tools) if self._arch == "amd64" else data

    def fill(self) -> None:
        contents, guest = self._contents, self._sources.guest
        contents.skeleton(self._python.name)
        contents.program(
            "Python", guest.find(f"usr/bin/{self._python.name}"), f"/usr/bin/{self._python.name}"
        )
        contents.library(SECCOMP_LIBRARY)
        entries = [name for package in AGENT_PACKAGES[:2] for name in modules_of(package, PACKAGES_DIR)]
        site = Path(google.protobuf.__file__).parent.parent.parent
        modules = self._python.collect(entries, [PACKAGES_DIR, site])
        if self._arch != host_arch():
            cache = cache_dir() / f"wheels-{self._arch}"
            modules = for_architecture(modules, guest, self._python.name, cache, self._progress)
        contents.python(modules, self._python.name)
        self._python_modules = len(modules.bytecode) + len(modules.extensions)
        wanted = (
            *KERNEL_MODULES,
            *(BIG_ENDIAN_MODULES if self._arch == "s390x" else VFIO_MODULES),
            *filter(self._modules_dir.has_file, SOME_KERNELS_MODULES),
        )
        usual = {module.name for module in self._modules_dir.closure(wanted)}
        some = filter(self._modules_dir.has_file, SELDOM_SOME_MODULES)
        drivers = self._modules_dir.closure((*wanted, *SELDOM_MODULES, *some))
        seldom = frozenset(module.name for module in drivers) - usual
        contents.seldom_program("programs", guest.find(*SELDOM_PROGRAM))
        contents.kernel_modules(self._modules_dir.release, drivers, self._modules_dir.builtin, seldom)
        self._module_names = [module.name for module in drivers]

    def finish(self, vmlinux_bytes: int, inputs: str) -> tuple[bytes, Manifest]:
        contents = self._contents
        version = agent_version()
        contents.add("agent", f"{DATA_DIR}/version", version.encode())
        facts = {
            "agent_version": version,
            "arch": self._arch,
            "kernel_release": self._modules_dir.release,
            "python_version": self._python.version(),
            "protobuf_version": google.protobuf.__version__,
            "packages": self._packages_used(),
            "kernel_modules": self._module_names,
            "python_modules": self._python_modules,
            "parts": contents.parts,
            "files": len(contents.tree),
            "files_sha256": _tree_digest(contents.tree),
            "vmlinux_bytes": vmlinux_bytes,
            "inputs_sha256": inputs,
            "notes": contents.notes,
        }
        inside = Manifest(**facts, initrd_bytes=0)  # type: ignore[arg-type]
        contents.tree.file(f"{DATA_DIR}/{FILE_NAME}", inside.to_json().encode())
        initrd = contents.tree.to_cpio()
        return initrd, Manifest(**facts, initrd_bytes=len(initrd))  # type: ignore[arg-type]

    def root_image(
        self, kind: FileSystem, *, verity: bool, tools: Root, programs: Root
    ) -> root_image.RootImage:
        tree = self._contents.tree
        return root_image.root_image(
            kind,
            tree,
            verity=verity,
            seed=bytes.fromhex(_tree_digest(tree)),
            modules=self._modules_dir,
            tools=tools,
            programs=programs,
        )

    def _packages_used(self) -> dict[str, str]:
        used = {*self._contents.packages, *self._sources.kernel.owners.values()}
        return {package.name: package.version for package in self._sources.packages if package.name in used}


def agent_version() -> str:
    """The project's version, from its installation or from the source tree."""
    try:
        return importlib.metadata.version("kata-py")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((PACKAGES_DIR / "pyproject.toml").read_text())
        return str(project["project"]["version"])


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kata-py" / "guest"


def _apt(kind: str, arch: str, suite: str | None, progress: Callable[[str], None]) -> Apt:
    apt = Apt(cache_dir() / f"{suite or 'default'}-{arch}" / kind, arch=arch, suite=suite)
    apt.refresh(progress)
    return apt


def _image_sources(arch: str, suite: str | None, progress: Callable[[str], None]) -> tuple[Root, Root]:
    """The unpacked programs that make a root image here, and those of the small initrd beside it."""
    here, guest = _apt("tools", host_arch(), suite, progress), _apt("guest", arch, suite, progress)
    tools = here.unpack("image-tools", here.closure(root_image.TOOLS), progress)
    return tools, guest.unpack("image-programs", guest.closure(root_image.PROGRAMS), progress)


def _sources(arch: str, suite: str | None, progress: Callable[[str], None]) -> _Sources:
    apt = _apt("guest", arch, suite, progress)
    python = next((name for name in apt.depends("python3-minimal") if name.startswith("python3.")), None)
    image = next(
        (name for name in apt.depends(KERNEL_PACKAGES[arch]) if name.startswith("linux-image-")), None
    )
    if python is None or image is None:
        raise ImageError(f"the mirror's suite has no {'kernel' if python else 'Python'} for {arch}")
    stdlib = f"lib{python.removesuffix('-minimal')}-stdlib"
    tool_names = ["lz4", "zstd", python, stdlib]
    guest_packages = apt.closure(
        [python, stdlib, "libseccomp2", "e2fsprogs", *(tool_names if arch == host_arch() else ())]
    )
    kernel_packages = apt.alone([image])
    guest = apt.unpack("root", guest_packages, progress)
    tools = guest
    if arch != host_arch():
        tools_apt = _apt("tools", host_arch(), suite, progress)
        tools = tools_apt.unpack("root", tools_apt.closure(tool_names), progress)
    kernel_root = apt.unpack("kernel", kernel_packages, progress)
    return _Sources(guest_packages + kernel_packages, guest, kernel_root, tools)


def _inputs_digest(arch: str, suite: str | None) -> str:
    digest = hashlib.sha256(f"{arch} {suite} {google.protobuf.__version__} {agent_version()}\n".encode())
    for path in _input_files():
        digest.update(f"{path.relative_to(PACKAGES_DIR)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _input_files() -> Iterator[Path]:
    for package in (*AGENT_PACKAGES, "guest_image"):
        yield from sorted((PACKAGES_DIR / package).rglob("*.py"))


def _up_to_date(output: Path, inputs: str, image: FileSystem | None, verity: bool) -> Manifest | None:
    try:
        manifest = Manifest.read(output / FILE_NAME)
        sizes = {name: (output / name).stat().st_size for name in manifest.sizes()}
    except (ImageError, FileNotFoundError):
        return None
    same = manifest.inputs_sha256 == inputs and sizes == manifest.sizes()
    same_image = (manifest.rootfs_type, bool(manifest.kernel_verity_params)) == (image or "", verity)
    return manifest if same and same_image else None


def _tree_digest(tree: Tree) -> str:
    digest = hashlib.sha256()
    for path, entry in tree:
        digest.update(f"{path} {stat.filemode(entry.mode)} {entry.device}\n".encode())
        digest.update(hashlib.sha256(entry.data).digest())
    return digest.hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Never a half-written file under the final name, also when two builds run at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.rename(path)

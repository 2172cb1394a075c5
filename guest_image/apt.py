"""Debian packages without root and without touching the system: a private apt state in a cache directory.

The machine's own mirrors are used. `suite` asks for another suite than theirs, taken from the same mirror.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from guest_image.errors import ImageError, ToolFailed
from guest_image.tools import Root, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

#: Package lists older than this are fetched again before packages are chosen.
LISTS_MAX_AGE_S = 6 * 3600
ARCHIVE_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)(?: (?P<digest>\S+))?$")


@dataclass(frozen=True, order=True)
class Package:
    """One version of one package, as the mirror offers it."""

    name: str
    version: str
    file: str
    size: int
    sha256: str


class Apt:
    """apt with its state, cache and (empty) list of installed packages under `directory`."""

    def __init__(self, directory: Path, *, arch: str, suite: str | None) -> None:
        self._dir = directory
        self._arch = arch
        self._suite = suite
        self._debs = directory / "debs"
        self._stamp = directory / "lists" / "fetched"
        for sub in ("lists/partial", "archives/partial", "debs"):
            (directory / sub).mkdir(parents=True, exist_ok=True)
        # With nothing installed, "install" resolves the complete set and not only what this machine lacks.
        (directory / "status").write_bytes(b"")

    def _options(self) -> list[str]:
        options = [
            f"Dir::State::Lists={self._dir}/lists",
            f"Dir::State::status={self._dir}/status",
            f"Dir::Cache={self._dir}",
            f"APT::Architecture={self._arch}",
            f"APT::Architectures::={self._arch}",
            "APT::Sandbox::User=",
            "Acquire::Languages=none",
            "Acquire::ForceHash=SHA256",  # what --print-uris shows; MD5 otherwise
        ]
        if self._suite is not None:
            options += [f"Dir::Etc::sourcelist={self._dir}/suite.list", "Dir::Etc::sourceparts=-"]
            # Else a mirror that cannot be reached is a warning, and looks like one that has nothing. Of the machine's
            # own sources one may fail that is of no interest here.
            options.append("APT::Update::Error-Mode=any")
        return [word for option in options for word in ("-o", option)]

    def _mirror(self) -> str:
        wanted = "$(REPO_URI)|$(COMPONENT)|$(RELEASE)"
        # With the release information, or a filter for apt, only what has been downloaded before is listed.
        listed = run(["apt-get", "indextargets", "--no-release-info", "--format", wanted]).decode()
        for line in listed.splitlines():
            uri, component, release = line.split("|")
            if component == "main" and uri.rstrip("/").endswith("/debian") and "-security" not in release:
                return uri.rstrip("/")
        return DEFAULT_MIRROR

    def newest(
        self, kind: str, choose: Callable[[], Sequence[Package]], progress: Callable[[str], None]
    ) -> Root:
        """The files of the packages that `choose` finds, as the mirror has them now.

        Versions leave the mirror when newer ones come, in sid every day: what cannot be downloaded is looked up again
        in lists of this moment. Raises ImageError.
        """
        self.refresh(progress)
        try:
            return self.unpack(kind, choose(), progress)
        except ToolFailed as err:
            progress(f"looking for newer versions: {err.said[0] if err.said else err}")
            self._stamp.unlink(missing_ok=True)
            self.refresh(progress)
            return self.unpack(kind, choose(), progress)

    def forget_packages(self) -> None:
        """Remove what has been downloaded, once it is unpacked."""
        for deb in self._debs.iterdir():
            deb.unlink()

    def refresh(self, progress: Callable[[str], None]) -> None:
        """Fetch the package lists when they are missing or old. Old lists are kept when the mirrors fail."""
        if self._stamp.exists() and time.time() - self._stamp.stat().st_mtime < LISTS_MAX_AGE_S:
            return
        progress("fetching package lists")
        if self._suite is not None:
            line = f"deb [signed-by={ARCHIVE_KEYRING}] {self._mirror()} {self._suite} main\n"
            (self._dir / "suite.list").write_text(line)
        try:
            run(["apt-get", *self._options(), "-qq", "update"])
        except ToolFailed as err:
            if not any((self._dir / "lists").glob("*_Packages*")):
                raise ImageError(f"no package lists: {err.said[0]}") from err
            progress(f"package lists are old, going on with them: {err.said[0]}")
            return
        self._stamp.touch()

    def depends(self, name: str) -> list[str]:
        """Names of the direct dependencies of a package's newest version. Raises ToolFailed when it is unknown."""
        text = run(["apt-cache", *self._options(), "--no-all-versions", "show", name]).decode()
        names = []
        for line in text.splitlines():
            field, _, value = line.partition(": ")
            if field in ("Depends", "Pre-Depends"):
                names += [re.split(r"[ :(|]", part.strip())[0] for part in value.split(",")]
        return names

    def closure(self, names: Sequence[str]) -> list[Package]:
        """The packages and everything they depend on."""
        words = ["-qq", "--print-uris", "-y", "--no-install-recommends", "install", *names]
        return self._packages(run(["apt-get", *self._options(), *words]).decode())

    def alone(self, names: Sequence[str]) -> list[Package]:
        """Only the packages named, without what they depend on."""
        return self._packages(
            run(["apt-get", *self._options(), "-qq", "--print-uris", "download", *names]).decode()
        )

    def _packages(self, printed: str) -> list[Package]:
        packages = []
        for line in printed.splitlines():
            match = _URI_LINE.match(line)
            if match is None:
                continue
            digest = match["digest"] or ""
            if not digest.startswith("SHA256:"):
                raise ImageError(f"the mirror gives no SHA-256 for {match['file']}")
            name, version, _arch = match["file"].removesuffix(".deb").split("_")
            packages.append(
                Package(
                    name, unquote(version), match["file"], int(match["size"]), digest.removeprefix("SHA256:")
                )
            )
        return sorted(packages)

    def fetch(self, packages: Iterable[Package], progress: Callable[[str], None]) -> list[Path]:
        """Download what is not in the cache yet; every file is checked against the mirror's SHA-256."""
        wanted = list(packages)
        missing = [package for package in wanted if not self._is_cached(package)]
        if missing:
            size_mb = sum(package.size for package in missing) / 1e6
            progress(f"downloading {len(missing)} packages, {size_mb:.1f} MB")
            names = [f"{package.name}={package.version}" for package in missing]
            run(["apt-get", *self._options(), "-qq", "download", *names], cwd=self._debs)
        for package in missing:
            if not self._is_cached(package):
                raise ImageError(
                    f"{package.file} is not what the mirror's list says; remove {self._dir} and retry"
                )
        return [self._debs / package.file for package in wanted]

    def _is_cached(self, package: Package) -> bool:
        path = self._debs / package.file
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256

    def unpack(self, kind: str, packages: Sequence[Package], progress: Callable[[str], None]) -> Root:
        """The packages' files under one directory, unpacked once per exact set of versions.

        Beside the directory a file of its name with `.owners` tells which package each path came from.
        """
        key = hashlib.sha256("\n".join(package.sha256 for package in packages).encode()).hexdigest()[:16]
        target = self._dir / f"{kind}-{key}"
        if not target.is_dir():
            debs = self.fetch(packages, progress)
            progress(f"unpacking {len(debs)} packages")
            for old in self._dir.glob(f"{kind}-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            self._unpack_into(target, packages, debs)
        owners = json.loads(target.with_suffix(".owners").read_text())
        return Root(target, self._arch, owners)

    def _unpack_into(self, target: Path, packages: Sequence[Package], debs: Sequence[Path]) -> None:
        partial = target.with_name(f"{target.name}-partial")
        partial.mkdir()
        owners = {}
        for package, deb in zip(packages, debs, strict=True):
            for path in run(["dpkg-deb", "--vextract", deb, partial]).decode().splitlines():
                owners[path.removeprefix("./")] = package.name
        target.with_suffix(".owners").write_text(json.dumps(owners))
        partial.rename(target)

"""The options of a mount, as words in the specification and as what the kernel is told. Pure."""

from __future__ import annotations

from oci_engine.linux import MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE
from oci_engine.records import Record

# MOUNT_ATTR_*, linux/mount.h
RDONLY = 0x1
NOSUID = 0x2
NODEV = 0x4
NOEXEC = 0x8
ATIME = 0x70  # the field, whose values are the next three
RELATIME = 0x00
NOATIME = 0x10
STRICTATIME = 0x20
NODIRATIME = 0x80
NOSYMFOLLOW = 0x200000

#: What each word sets, and clears, of the attributes of one mount.
_ATTRIBUTES: dict[str, tuple[int, int]] = {
    "ro": (RDONLY, 0), "rw": (0, RDONLY),
    "nosuid": (NOSUID, 0), "suid": (0, NOSUID),
    "nodev": (NODEV, 0), "dev": (0, NODEV),
    "noexec": (NOEXEC, 0), "exec": (0, NOEXEC),
    "nodiratime": (NODIRATIME, 0), "diratime": (0, NODIRATIME),
    "nosymfollow": (NOSYMFOLLOW, 0), "symfollow": (0, NOSYMFOLLOW),
    "noatime": (NOATIME, ATIME), "atime": (RELATIME, ATIME),
    "relatime": (RELATIME, ATIME), "norelatime": (RELATIME, ATIME),
    "strictatime": (STRICTATIME, ATIME), "nostrictatime": (RELATIME, ATIME),
}  # fmt: skip
_PROPAGATION = {"private": MS_PRIVATE, "shared": MS_SHARED, "slave": MS_SLAVE, "unbindable": MS_UNBINDABLE}
#: Of the whole file system, passed on as its parameters.
_SUPERBLOCK = frozenset({"sync", "dirsync", "lazytime", "mand"})
#: Words that ask for what is there anyway.
_NO_EFFECT = frozenset(
    {"defaults", "async", "nolazytime", "nomand", "loud", "silent", "noiversion", "iversion"}
)
UNSUPPORTED = frozenset({"copy-symlink"})


class Attributes(Record):
    """Bits to set and to clear. A field that is set has all of its bits in `clear`, as mount_setattr(2) wants."""

    set: int = 0
    clear: int = 0

    def then(self, change: tuple[int, int]) -> Attributes:
        """Later words win over earlier ones."""
        set_, clear = change
        return Attributes(
            set=self.set & ~clear | set_,
            clear=(self.clear | clear) & ~(set_ & ~ATIME),
        )

    def without(self, bits: int) -> Attributes:
        return Attributes(set=self.set & ~bits, clear=self.clear)

    def __bool__(self) -> bool:
        return bool(self.set or self.clear)


class MountOptions(Record):
    """`propagation` is (flag, with what is below); `data` are the file system's own parameters, in order.

    `idmap` is empty, or `idmap`, or `ridmap` which is with what is below.
    """

    bind: bool
    recursive: bool
    remount: bool
    attributes: Attributes
    recursive_attributes: Attributes
    propagation: tuple[tuple[int, bool], ...]
    data: tuple[str, ...]
    copy_up: bool
    idmap: str


def parse_options(words: tuple[str, ...], *, kind: str = "") -> MountOptions:
    """Raises ValueError with the word that cannot be met. Unknown words are the file system's."""
    bind = kind in ("bind", "rbind")
    recursive = kind == "rbind"
    remount = copy_up = False
    idmap = ""
    attributes = recursive_attributes = Attributes()
    propagation: list[tuple[int, bool]] = []
    data: list[str] = []
    for word in words:
        if word in ("bind", "rbind"):
            bind, recursive = True, recursive or word == "rbind"
        elif word == "remount":
            remount = True
        elif word == "tmpcopyup":
            copy_up = True
        elif word in ("idmap", "ridmap"):
            idmap = "ridmap" if "ridmap" in (word, idmap) else word
        elif word in UNSUPPORTED:
            raise ValueError(word)
        elif word in _ATTRIBUTES:
            attributes = attributes.then(_ATTRIBUTES[word])
        elif word in _PROPAGATION:
            propagation.append((_PROPAGATION[word], False))
        elif word[:1] == "r" and word[1:] in _PROPAGATION:
            propagation.append((_PROPAGATION[word[1:]], True))
        elif word[:1] == "r" and word[1:] in _ATTRIBUTES:
            recursive_attributes = recursive_attributes.then(_ATTRIBUTES[word[1:]])
        elif word and word not in _NO_EFFECT:
            data.append(word)
    return MountOptions(
        bind=bind,
        recursive=recursive,
        remount=remount,
        attributes=attributes,
        recursive_attributes=recursive_attributes,
        propagation=tuple(propagation),
        data=tuple(data),
        copy_up=copy_up,
        idmap=idmap,
    )


def known_words() -> list[str]:
    """All words that are not a file system's own, for `features`."""
    recursive = [f"r{word}" for word in (*_ATTRIBUTES, *_PROPAGATION)]
    words = {
        "bind",
        "rbind",
        "remount",
        "tmpcopyup",
        "idmap",
        "ridmap",
        *_ATTRIBUTES,
        *_PROPAGATION,
        *recursive,
    }
    return sorted(words | _SUPERBLOCK | _NO_EFFECT)

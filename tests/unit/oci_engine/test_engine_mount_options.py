"""Mount options: words to attributes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_engine.errors import SpecError, Unsupported
from oci_engine.linux import MS_PRIVATE, MS_SHARED, MS_SLAVE
from oci_engine.linux_spec import IdMapping
from oci_engine.mount_options import (
    ATIME,
    NOATIME,
    NODEV,
    NOEXEC,
    NOSUID,
    RDONLY,
    STRICTATIME,
    known_words,
    parse_options,
)
from oci_engine.planner import plan_mount
from oci_engine.records import replace
from oci_engine.spec import Mount

PAIRS = {"ro": "rw", "nosuid": "suid", "nodev": "dev", "noexec": "exec", "nosymfollow": "symfollow"}
BITS = {"ro": RDONLY, "nosuid": NOSUID, "nodev": NODEV, "noexec": NOEXEC, "nosymfollow": 0x200000}


def test_words_of_all_kinds() -> None:
    options = parse_options(
        ("rbind", "ro", "nosuid", "rslave", "private", "noatime", "rnoexec", "size=1m", "sync", "defaults")
    )
    assert options.bind
    assert options.recursive
    assert options.attributes.set == RDONLY | NOSUID | NOATIME
    assert options.attributes.clear & ATIME == ATIME
    assert options.recursive_attributes.set == NOEXEC
    assert options.propagation == ((MS_SLAVE, True), (MS_PRIVATE, False))
    assert options.data == ("size=1m", "sync")


def test_type_bind_is_a_bind() -> None:
    assert parse_options((), kind="bind").bind
    assert not parse_options((), kind="bind").recursive
    assert parse_options((), kind="rbind").recursive


@given(st.lists(st.sampled_from([*PAIRS, *PAIRS.values()]), max_size=12))
def test_the_last_word_wins(words: list[str]) -> None:
    options = parse_options(tuple(words))
    for set_word, clear_word in PAIRS.items():
        spoken = [word for word in words if word in (set_word, clear_word)]
        assert bool(options.attributes.set & BITS[set_word]) == (spoken[-1:] == [set_word])
        assert bool(options.attributes.clear & BITS[set_word]) == (spoken[-1:] == [clear_word])
    assert options.attributes.set & options.attributes.clear & ~ATIME == 0


@given(
    st.lists(st.sampled_from(["noatime", "relatime", "strictatime", "atime", "ro"]), min_size=1, max_size=6)
)
def test_one_policy_of_access_times(words: list[str]) -> None:
    options = parse_options(tuple(words))
    last = next((word for word in reversed(words) if word != "ro"), None)
    assert options.attributes.set & ATIME == {"noatime": NOATIME, "strictatime": STRICTATIME}.get(
        last or "", 0
    )
    assert options.attributes.clear & ATIME == (ATIME if last else 0)


@given(st.lists(st.text(alphabet="abcdefgrons=/,.1", min_size=1, max_size=8), max_size=6))
def test_every_word_is_an_option_or_the_file_systems(words: list[str]) -> None:
    options = parse_options(tuple(words))
    assert [word for word in words if word not in known_words()] == [
        word for word in options.data if word not in known_words()
    ]


def test_known_words() -> None:
    assert {"rro", "rnosymfollow", "rshared", "bind", "tmpcopyup", "lazytime"} <= set(known_words())
    assert {"idmap", "ridmap"} <= set(known_words())
    assert parse_options(("rshared",)).propagation == ((MS_SHARED, True),)


def mount(*options: str, kind: str = "", source: str = "src") -> Mount:
    return Mount(destination="/d", type=kind, source=source, options=options, place="mounts[3]")


def test_sources_of_binds_are_relative_to_the_bundle() -> None:
    assert plan_mount(mount("bind"), "/bundle").source == "/bundle/src"
    assert plan_mount(mount("bind", source="/abs"), "/bundle").source == "/abs"
    assert plan_mount(mount(kind="tmpfs"), "/bundle").source == "src"


@pytest.mark.parametrize("word", ["copy-symlink"])
def test_options_that_are_refused(word: str) -> None:
    with pytest.raises(Unsupported, match=rf"mounts\[3\]\.options: {word} is not supported"):
        plan_mount(mount("bind", word), "/")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (mount("bind", source=""), "source: is missing"),
        (mount("bind", "size=1m"), "'size=1m' has no meaning for a bind"),
        (mount("bind", "tmpcopyup"), "tmpcopyup is for tmpfs"),
        (mount("tmpcopyup", kind="proc"), "tmpcopyup is for tmpfs"),
        (mount("ro"), "type: is missing"),
        (mount("bind", "idmap"), "idmap needs uidMappings and gidMappings"),
        (mount("idmap", kind="tmpfs"), "in binds alone"),
        (mount("bind", "remount", "ridmap"), "in binds alone"),
    ],
)
def test_mounts_that_make_no_sense(wrong: Mount, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        plan_mount(wrong, "/")


ONE = (IdMapping(container=0, host=1, size=1),)


@pytest.mark.parametrize(
    ("words", "mappings", "maps_users", "wanted"),
    [
        (("bind",), ONE, False, "idmap"), (("rbind", "idmap"), ONE, True, "idmap"),
        (("bind", "idmap"), (), True, "idmap"),
        (("rbind", "ridmap"), (), True, "ridmap"), (("rbind", "ridmap", "idmap"), ONE, False, "ridmap"),
        (("rbind",), (), True, ""),
    ],
)  # fmt: skip
def test_when_ids_are_mapped_anew(
    words: tuple[str, ...], mappings: tuple[IdMapping, ...], maps_users: bool, wanted: str
) -> None:
    mapped = replace(mount(*words), uid_mappings=mappings, gid_mappings=mappings)
    assert plan_mount(mapped, "/", maps_users=maps_users).options.idmap == wanted


WORDS = [
    word for word in known_words() if word not in ("bind", "rbind", "remount", "tmpcopyup", "idmap", "ridmap")
]


@given(st.lists(st.sampled_from(WORDS), max_size=10), st.lists(st.sampled_from(WORDS), max_size=10))
def test_later_words_say_the_last_about_what_they_are_about(first: list[str], then: list[str]) -> None:
    """What a list of words means does not depend on what stood before it, where it says something itself."""
    both, alone = parse_options((*first, *then)), parse_options(tuple(then))
    for kind in ("attributes", "recursive_attributes"):
        whole, last = getattr(both, kind), getattr(alone, kind)
        about = last.set | last.clear
        assert whole.set & about == last.set
        assert (whole.set | whole.clear) & about == about
        # What the kernel refuses: to set a bit and to clear it, unless it is a field's.
        assert whole.set & whole.clear & ~ATIME == 0
        assert not whole.set & ATIME or whole.clear & ATIME == ATIME
    assert both.propagation[len(both.propagation) - len(alone.propagation) :] == alone.propagation


@given(st.lists(st.sampled_from(WORDS), max_size=10))
def test_words_about_all_below_are_those_about_one_with_a_letter_before(words: list[str]) -> None:
    plain = [word for word in words if f"r{word}" in WORDS]
    whole = parse_options(tuple(f"r{word}" for word in plain))
    assert whole.recursive_attributes == parse_options(tuple(plain)).attributes
    assert [flag for flag, _ in whole.propagation] == [
        flag for flag, _ in parse_options(tuple(plain)).propagation
    ]
    assert all(below for _, below in whole.propagation)
    assert not whole.attributes

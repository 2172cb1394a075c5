"""Whatever a file holds, the answer is a configuration or a list of problems."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from config import Config, ConfigError, load
from config.annotation_rules import RULES
from config.annotations import annotate
from config.decode import decode
from config.effects import check_effects
from config.schema import SECTIONS
from config.tree import Report, Tree
from config.validate import adjust_and_validate
from tests.unit.config.config_site import HOST

NAMES = sorted(
    {name for section in SECTIONS.values() for name in section.__struct_fields__} | {"kata", "qemu", "clh"}
)
HEADERS = [header.split(".") for header in SECTIONS]

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 300),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "none", "auto", "/", "/dev/null", "on", "a\0b", "a\nb"]),
    st.just(date(2024, 2, 29)),
)
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=6))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A file: values in the places where keys are, and anything anywhere."""
    tree: dict[str, Any] = draw(st.dictionaries(names, values, max_size=2))
    for header in draw(st.lists(st.sampled_from(HEADERS), max_size=4)):
        table = tree
        for part in header:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table = table[part]
        known = SECTIONS[".".join(header)].__struct_fields__
        table.update(draw(st.dictionaries(st.sampled_from(known), values, max_size=6)))
    return tree


def check_values(config: Config) -> None:
    """Every value is one that the schema allows, and nothing that QEMU or virtiofsd reads has a second line."""
    for section in (config.hypervisor, config.agent, config.runtime, config.factory):
        assert msgspec.convert(msgspec.to_builtins(section), type(section)) == section
    qemu = config.hypervisor
    words = (qemu.machine_accelerators, qemu.cpu_features, qemu.kernel_params, qemu.seccomp_sandbox)
    assert all(word.isprintable() for word in (*words, *qemu.virtio_fs_extra_args))
    assert 0 < qemu.default_vcpus <= qemu.default_maxvcpus <= HOST.cpus
    assert 64 <= qemu.default_memory <= qemu.default_maxmemory <= HOST.memory_mib


def answer(tables: list[dict[str, Any]]) -> Config:
    tree = Tree(Path("/base"), tables[0])
    for number, table in enumerate(tables[1:]):
        tree.merge(Path(f"/{number}"), table)
    report = Report(tree)
    config = adjust_and_validate(decode(tree.table, report), HOST, report)
    check_effects(config, report)
    report.raise_any()
    return config


@given(st.lists(trees(), min_size=1, max_size=3))
def test_any_tables(tables: list[dict[str, Any]]) -> None:
    try:
        check_values(answer(tables))
    except ConfigError as err:
        assert err.problems
        assert len(str(err).splitlines()) == len(err.problems) == len(set(err.problems))


FILES = {"path": "/bin/sh", "kernel": "/bin/sh", "initrd": "/bin/sh", "virtio_fs_daemon": "/bin/sh"}
texts = st.one_of(
    st.text(max_size=12),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["true", "1.5", "2Gi", "/bin/sh", "[]", '["a"]', '[{"name":3}]', "none", "a=b,c\nd", "bmFu"]
    ),
)
pods = st.dictionaries(
    st.sampled_from(sorted(RULES)) | st.text(max_size=6).map("io.katacontainers.config.".__add__),
    texts,
    max_size=3,
)


@given(pods)
def test_any_annotations(annotations: dict[str, str]) -> None:
    allowed = {"enable_annotations": [".*"], "valid_hypervisor_paths": ["/bin/*"]}
    table: dict[str, Any] = {"hypervisor": {"qemu": FILES | allowed}}
    before = answer([table])
    tree = Tree(Path("/base"), table)
    report = Report(tree)
    annotate(tree, annotations, before, report)
    config = adjust_and_validate(decode(tree.table, report), HOST, report)
    check_effects(config, report)
    try:
        report.raise_any()
    except ConfigError as err:
        assert all(str(problem.file).startswith("annotation ") for problem in err.problems)
        assert len(str(err).splitlines()) == len(err.problems)
    else:
        check_values(config)


@given(trees())
def test_every_wrong_key_is_reported_once(tree: dict[str, Any]) -> None:
    try:
        answer([tree])
    except ConfigError as err:
        keys = [problem.key for problem in err.problems]
        assert len(keys) == len(set(keys))


@given(tables=st.lists(trees(), min_size=2, max_size=3))
def test_merging_is_reading_from_the_last_file_that_has_the_key(tables: list[dict[str, Any]]) -> None:
    tree = Tree(Path("/base"), {})
    for number, table in enumerate(tables):
        tree.merge(Path(f"/{number}"), table)
    check_leaves(tree, tree.table, (), tables)


def check_leaves(
    tree: Tree, table: Mapping[str, Any], where: tuple[str, ...], sources: list[dict[str, Any]]
) -> None:
    for name, value in table.items():
        here = (*where, name)
        if isinstance(value, dict):
            check_leaves(tree, value, here, sources)
        else:
            origin = int(str(tree.origin(here)).strip("/"))
            found = sources[origin]
            for part in here:
                found = found[part]
            assert repr(found) == repr(value)
            assert not any(has(source, here) for source in sources[origin + 1 :])


def has(table: object, where: tuple[str, ...]) -> bool:
    """Whether the way to a key, or to a value that stands in its way, exists."""
    for part in where:
        if not isinstance(table, dict):
            return True
        if part not in table:
            return False
        table = table[part]
    return True


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "configuration.toml"
        file.write_bytes(content)
        try:
            assert load(file, env={}, host=HOST).path == file.resolve()
        except ConfigError as err:
            assert len(str(err).splitlines()) == len(err.problems) > 0

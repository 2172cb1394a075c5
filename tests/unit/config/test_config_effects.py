"""Keys that this version cannot serve: silent, named in a warning, or refused, as the schema says."""

import csv
from pathlib import Path

import pytest
from msgspec.structs import replace

from config import load
from config.effects import check_effects
from config.schema import SECTIONS, Config, Section, info
from config.tree import Report, Tree
from tests.unit.config.config_site import HOST, Site

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "config" / "defaults" / "configuration-qemu.toml"
CONFIDENTIAL = sorted(TEMPLATE.parent.glob("configuration-qemu-*.toml"))


def kata_template(site: Site, column: str, overrides: dict[str, str]) -> str:
    """A configuration file with the values of one of Kata's own templates."""
    lines = (Path(__file__).parent / "data" / "kata_keys.tsv").read_text().splitlines()[1:]
    sections: dict[str, list[str]] = {}
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        value = row[column]
        if row["section"] == "hypervisor.qemu":
            value = overrides.get(row["key"], value)
        if value != "-":
            sections.setdefault(row["section"], []).append(f"{row['key']} = {value}\n")
    arrays = ("hypervisor.qemu.guest_extension_images", "runtime.shared_mounts")
    return "".join(
        f"{f'[[{header}]]' if header in arrays else f'[{header}]'}\n{''.join(keys)}"
        for header, keys in sections.items()
    )


def site_files(site: Site) -> dict[str, str]:
    return dict(line.split(" = ") for line in site.required().splitlines())


@pytest.mark.parametrize("column", ["plain_4_1", "plain_3_26"])
def test_a_kata_file_loads_with_its_image(site: Site, column: str) -> None:
    image = site.root / "image"
    image.write_bytes(b"disk")
    files = site_files(site) | {"initrd": "-", "image": f'"{image}"'}
    hypervisor = site.load(kata_template(site, column, files)).config.hypervisor
    assert (hypervisor.image, hypervisor.initrd) == (str(image), "")


def test_image_and_initrd_exclude_each_other(site: Site) -> None:
    image = site.root / "image"
    image.write_bytes(b"disk")
    (problem,) = site.problems(f'image = "{image}"\n')
    assert problem.startswith("hypervisor.qemu.image: a guest has an image or an initrd, not both")


@pytest.mark.parametrize("column", ["plain_4_1", "plain_3_26"])
def test_a_kata_file_loads_with_an_initrd(site: Site, column: str) -> None:
    result = site.load(kata_template(site, column, site_files(site) | {"image": "-"}))
    assert result.config.hypervisor.cpu_features == "pmu=off"
    assert result.warnings == ()


def test_a_key_below_the_wrong_header_of_a_kata_file_is_pointed_out(site: Site) -> None:
    text = f"[hypervisor.qemu]\n{site.required()}[agent.kata.mem_agent]\ncreate_container_timeout = 30\n"
    (line,) = site.load(text).warnings
    assert line.endswith(
        ": agent.kata.mem_agent.create_container_timeout: no effect in this version: it belongs to [agent.kata] "
        "(move it up into [agent.kata])"
    )


@pytest.mark.parametrize(
    "line",
    [
        "factory.enable_template = true",
        "jailer_path = '/usr/bin/jailer'",
    ],
)
def test_what_would_be_unsafe_to_ignore_is_refused(site: Site, line: str) -> None:
    (problem,) = site.problems(line + "\n")
    assert problem.startswith(f"hypervisor.qemu.{line.split(' ')[0]}: not supported in this version: ")


def test_an_extension_without_a_file_is_dropped(site: Site) -> None:
    config = site.qemu("guest_extension_images = [{name = 'coco'}]\n").config
    assert config.hypervisor.guest_extension_images == ()


def test_the_default_written_down_asks_for_nothing(site: Site) -> None:
    result = site.qemu("confidential_guest = false\nenable_iommu = false\nfactory.enable_template = false\n")
    assert result.warnings == ()


def other_value(value: object) -> object:
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    return ("x",) if isinstance(value, tuple) else 77 if value is None else value + 1  # type: ignore[operator]


def keys_with_parent() -> list[tuple[str, str, str]]:
    homes = {
        "hypervisor.qemu": "hypervisor",
        "agent.kata": "agent",
        "runtime": "runtime",
        "factory": "factory",
    }
    return [
        (attribute, header, name)
        for header, attribute in homes.items()
        for name in SECTIONS[header].__struct_fields__
        if not isinstance(getattr(SECTIONS[header](), name), Section)
    ]


@pytest.mark.parametrize(("attribute", "header", "name"), keys_with_parent())
def test_every_key_does_what_its_effect_says(attribute: str, header: str, name: str) -> None:
    config = Config()
    section = getattr(config, attribute)
    changed = replace(section, **{name: other_value(getattr(section, name))})
    report = Report(Tree(None, {}))
    warned = check_effects(replace(config, **{attribute: changed}), report)
    effect = info(SECTIONS[header], name).effect
    assert [remark.key for remark in warned] == ([f"{header}.{name}"] if effect == "warned" else [])
    assert report.is_bad((*header.split("."), name)) == (effect == "refused")


def test_our_own_file_loads_without_warnings(site: Site) -> None:
    site.file.write_text(TEMPLATE.read_text())
    site.drop_in("10-files.toml", "[hypervisor.qemu]\n" + site.required())
    result = load(site.file, env={}, host=HOST)
    assert result.warnings == ()
    assert result.config.hypervisor.default_memory == 2048


def test_our_own_files_show_every_key_with_an_effect() -> None:
    lines = [line for file in (TEMPLATE, *CONFIDENTIAL) for line in file.read_text().splitlines()]
    # A key in a comment is one that is better not set without need.
    shown = {line.removeprefix("# ").split(" = ")[0] for line in lines if " = " in line}
    effective = {
        name for _, header, name in keys_with_parent() if info(SECTIONS[header], name).effect == "now"
    }
    arrays_of_tables = {"shared_mounts", "guest_extension_images"}
    assert effective - shown == {"seccompsandbox"} | arrays_of_tables

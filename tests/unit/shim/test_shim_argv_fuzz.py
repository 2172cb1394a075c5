"""Whatever is configured, QEMU reads from its arguments exactly the values that were put in, and no other option."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import fields

from config import ConfigError
from config.annotations import annotate
from config.decode import decode
from config.describe import unwrap
from config.effects import check_effects
from config.schema import Qemu
from config.tree import Report, Tree
from config.validate import adjust_and_validate
from hypervisor.errors import HypervisorError, InvalidSpec
from hypervisor.extension import Extension
from hypervisor.qemu.cmdline import Fds, build_cmdline
from hypervisor.spec import Share, VmSpec
from shim.vmspec import vm_spec
from tests.unit.config.config_site import HOST
from tests.unit.config.test_config_fuzz import FILES, answer, pods

if TYPE_CHECKING:
    from collections.abc import Callable

    from config import Config

FDS = Fds(qmp=10, console=11, vsock=12, guest_cid=3, shares=(13,), initdata=14)
ALONE = frozenset({"-no-user-config", "-nodefaults", "-no-reboot", "-no-shutdown"})
# Whose value is one text, commas and all.
PLAIN = frozenset({"-kernel", "-initrd", "-append", "-bios", "-vga", "-display", "-serial"})
# Whose value is a list of properties.
LISTS = frozenset(
    {
        "-name",
        "-smp",
        "-machine",
        "-accel",
        "-cpu",
        "-m",
        "-object",
        "-chardev",
        "-mon",
        "-device",
        "-blockdev",
    }
    | {"-drive", "-sandbox", "-fsdev", "-add-fd", "-numa"}
)
# Their properties are the user's own, checked where the configuration is read.
RAW = frozenset({"-machine", "-cpu"})

Parsed = list[tuple[str, tuple[tuple[str, str], ...]]]


def parse(argv: list[str]) -> Parsed:
    """Options with their values, as QEMU sees them (util/qemu-option.c, util/keyval.c)."""
    found: Parsed = [("", (("", argv[0]),))]
    words = iter(argv[1:])
    for switch in words:
        if switch in ALONE:
            found.append((switch, ()))
        elif switch in PLAIN:
            found.append((switch, (("", next(words)),)))
        else:
            assert switch in LISTS, switch
            found.append((switch, tuple(_properties(next(words)))))
    return found


def _properties(text: str) -> list[tuple[str, str]]:
    """A name ends at the first =, unless a comma comes before it: then it is a value without a name."""
    found = []
    while text:
        name = re.match(r"[^=,]*=", text)
        value, text = _value(text[name.end() :] if name else text)
        found.append((name[0][:-1] if name else "", value))
    return found


def _value(text: str) -> tuple[str, str]:
    """Up to a comma that is not doubled; and what comes after it."""
    end = re.match(r"(?:[^,]|,,)*", text, re.DOTALL)
    assert end is not None
    return end[0].replace(",,", ","), text[end.end() + 1 :]


# Values that QEMU, a shell or the kernel could take for more than one.
nasty = st.text(
    alphabet=st.sampled_from("a1,=-\n\0\r \"'%:;/\\{}[]é"), min_size=1, max_size=12
) | st.sampled_from(
    [
        "a,b=c",
        ",,",
        ",",
        "=",
        "-device",
        "a -device b",
        "x,id=y,,z",
        "file.driver=nbd",
        "a,readonly=off",
        "\n-S",
    ]
)
paths = nasty.map(lambda text: Path(f"/{text}"))


@st.composite
def machines(draw: st.DrawFn) -> tuple[VmSpec, dict[str, str]]:
    """A machine whose texts are marks, and what is to be in the place of each."""
    marks: dict[str, str] = {}

    def mark(value: str) -> str:
        name = f"mark{len(marks)}end"
        marks[name] = value
        return name

    def path() -> Path:
        return Path(mark(str(draw(paths))))

    by_image = draw(st.booleans())
    pflash = draw(st.booleans())
    spec = VmSpec(
        name=mark(draw(nasty)),
        run_dir=path(),
        qemu_path=path(),
        kernel=path(),
        initrd=None if by_image else path(),
        image=path() if by_image else None,
        image_bytes=4096,
        rootfs_driver=draw(st.sampled_from(["virtio-blk", "nvdimm"])) if by_image else "virtio-blk",
        firmware=None if pflash else path(),
        pflash=(path(), path()) if pflash else (),
        memory_dir=path() if draw(st.booleans()) else None,
        extra_monitor=draw(st.sampled_from([None, "hmp", "qmp"])),
        extensions=(Extension(name="tools", image=path()),) if draw(st.booleans()) else (),
        entropy_source=path() if draw(st.booleans()) else None,
        shares=(Share(tag=mark(draw(nasty)), directory=Path("/d"), daemon=Path("/v")),),
    )
    return spec, marks


def filled(spec: VmSpec, fill: Callable[[str], str]) -> VmSpec:
    """The same machine with every mark replaced."""

    def value(old: Any) -> Any:
        if isinstance(old, Path):
            return Path(fill(str(old)))
        if isinstance(old, tuple):
            return tuple(map(value, old))
        if isinstance(old, Extension):
            return replace(old, image=value(old.image))
        if isinstance(old, Share):
            return replace(old, tag=fill(old.tag))
        return fill(old) if isinstance(old, str) else old

    return replace(spec, **{name: value(old) for name, old in vars(spec).items()})


@given(machines())
def test_values_come_out_as_they_went_in(made: tuple[VmSpec, dict[str, str]]) -> None:
    spec, marks = made

    def fill(text: str) -> str:
        for name, value in marks.items():
            text = text.replace(name, value)
        return text

    expected = parse(build_cmdline(spec, FDS))
    try:
        argv = build_cmdline(filled(spec, fill), FDS)
    except InvalidSpec:
        assert any(set(value) & set("\n\r\0") for value in marks.values()) or "=" in marks[spec.name]
        return
    # A path may lose doubled slashes on the way; nothing else of it.
    same = [(switch, tuple((key, fill(value)) for key, value in pairs)) for switch, pairs in expected]
    assert [switch for switch, _ in parse(argv)] == [switch for switch, _ in same]
    for (switch, found), (_, wanted) in zip(parse(argv), same, strict=True):
        assert [(key, squeezed(value)) for key, value in found] == [
            (key, squeezed(value)) for key, value in wanted
        ], switch


def squeezed(text: str) -> str:
    """Path leaves two slashes at the front alone."""
    return f"/{str(Path(text)).lstrip('/')}" if text.startswith("/") else text


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    inner = unwrap(kind)[0]
    if get_origin(inner) is Literal:
        return st.sampled_from(get_args(inner))
    if get_origin(inner) is tuple:
        return st.lists(of_type(get_args(inner)[0]), max_size=2)
    if inner is bool:
        return st.booleans()
    if inner is str:
        return nasty | st.sampled_from(["", "/bin/sh", "/dev/zero", "pmu=off", "a=b", "usb=off", "on"])
    if inner in (int, float):
        return st.sampled_from([0, 1, 2, 4, 64, 300, 1024, 4096])
    return st.dictionaries(st.sampled_from(["name", "path", "verity_params"]), nasty, max_size=3)


tables = st.fixed_dictionaries({}, optional={field.name: of_type(field.type) for field in fields(Qemu)})


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    """A few keys of [hypervisor.qemu], with values of their types."""
    found: dict[str, Any] = draw(tables)
    kept = draw(st.sets(st.sampled_from(sorted(found)), max_size=4)) if found else set()
    return {key: found[key] for key in kept}


def check_arguments(config: Config) -> None:
    """Every option is one that we have, with properties that we have, whatever the texts are."""
    try:
        spec = vm_spec(
            config, "s1", accel="tcg", vsock="user", virtiofsd=Path("/v"), exported=Path("/e"), netns=None,
            tsc_khz=None, image_bytes=4096,
        )  # fmt: skip
        shares = tuple(20 + index for index, _ in enumerate(spec.shares))
        argv = build_cmdline(spec, Fds(qmp=10, console=11, vsock=12, shares=shares, initdata=14))
    except HypervisorError as err:
        assert len(str(err).splitlines()) == 1
        return
    assert not any(set(word) & set("\n\r\0") for word in argv)
    for switch, pairs in parse(argv):
        for key, _ in pairs[1:]:
            assert key or switch == "-cpu" or switch == "-machine" or switch == "-sandbox", (switch, pairs)
            if switch not in RAW:
                assert key.replace("-", "").replace("_", "").replace(".", "").isalnum(), (switch, pairs)
    (machine,) = (pairs for switch, pairs in parse(argv) if switch == "-machine")
    assert [value for key, value in machine if key == "memory-backend"] == ["mem"]
    assert {key for key, _ in machine}.isdisjoint({"kernel", "initrd", "append", "firmware", "accel"})


@given(sections())
def test_any_values_of_keys(section: dict[str, Any]) -> None:
    try:
        config = answer([{"hypervisor": {"qemu": FILES | section}}])
    except ConfigError as err:
        assert len(str(err).splitlines()) == len(err.problems)
        return
    check_arguments(config)


@given(pods, sections())
def test_any_annotations_over_them(annotations: dict[str, str], section: dict[str, Any]) -> None:
    table: dict[str, Any] = {
        "hypervisor": {
            "qemu": FILES | section | {"enable_annotations": [".*"], "valid_hypervisor_paths": ["/bin/*"]}
        }
    }
    try:
        before = answer([table])
    except ConfigError:
        assume(False)
    tree = Tree(Path("/base"), table)
    report = Report(tree)
    annotate(tree, annotations, before, report)
    config = adjust_and_validate(decode(tree.table, report), HOST, report)
    check_effects(config, report)
    try:
        report.raise_any()
    except ConfigError:
        return
    check_arguments(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b=c", [("", "a"), ("b", "c")]),
        ("a,,b=c,d=e=f", [("", "a,b=c"), ("d", "e=f")]),
        ("driver=file,filename=/x,,y", [("driver", "file"), ("filename", "/x,y")]),
        ("a=,,,b=c", [("a", ","), ("b", "c")]),
    ],
)
def test_the_parser_of_this_test(text: str, expected: list[tuple[str, str]]) -> None:
    assert _properties(text) == expected

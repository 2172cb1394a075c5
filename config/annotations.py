"""What a pod's annotations change: one more layer over the files, or problems that name the annotation.

An annotation sets a key, and is then decoded, adjusted and judged as that key in a file is. What is its own is here:
how its text becomes a value, and who allows it. `enable_annotations` lists the `hypervisor` keys that pods may set, as
regular expressions of which one must match the whole name; programs and directories must be found by the patterns of
the `valid_*` keys as well. Nothing is dropped: what is unknown, not allowed or out of reach is a problem.
"""

import re
from collections.abc import Mapping
from typing import Any

from config import foreign
from config.annotation_rules import HYPERVISOR, RULES, value_of
from config.errors import Problem
from config.schema import ANNOTATION_PREFIX, SECTIONS, Config, annotation
from config.schema.hypervisor import ARCHITECTURES
from config.tree import KeyPath, Report, Table, Tree, show_string

_MACHINE_TYPE = f"{HYPERVISOR}machine_type"
# Written by runtimes for agents, and meant for single containers: not about the configuration.
_OTHERS = ("io.katacontainers.pkg.", "io.katacontainers.container.")


def annotate(tree: Tree, annotations: Mapping[str, str], config: Config, report: Report) -> None:
    """Lay the annotations over the tree of the files, which `config` was decoded from; problems go to `report`."""
    given: set[KeyPath] = set()
    for name in sorted(filter(is_ours, annotations)):
        origin = f"annotation {name if name.isprintable() else show_string(name)}"
        try:
            where, value = _read(name, annotations[name], config)
        except _Refusal as err:
            report.note(Problem(origin, "", *err.args))
        else:
            tree.merge(origin, _table(where, value))
            given.add(where)
    others = ARCHITECTURES.keys() - {config.hypervisor.machine_type}
    if foreign.MACHINE_TYPE in given and annotations[_MACHINE_TYPE] in others:
        foreign.drop_bound(tree, keep=given)
    _one_root(tree, given)


def is_ours(name: str) -> bool:
    """Whether an annotation is one for the configuration."""
    return name.startswith(ANNOTATION_PREFIX) and not name.startswith(_OTHERS)


def _one_root(tree: Tree, given: set[KeyPath]) -> None:
    """A pod that names an image does not want the file's initrd, and the other way round.

    Another image goes on being mounted by the file's `image_initrd`, whose drivers are of the kernel, not of the image.
    """
    image, initrd, small = (("hypervisor", "qemu", name) for name in ("image", "initrd", "image_initrd"))
    for mine, other in ((image, initrd), (initrd, image), (initrd, small)):
        if mine in given and other not in given:
            tree.merge(str(tree.origin(mine)), _table(other, ""))


class _Refusal(Exception):
    """Problem and hint."""


def _read(name: str, text: str, config: Config) -> tuple[KeyPath, object]:
    rule = RULES.get(name)
    if rule is None:
        raise _Refusal("unknown annotation", _advice(name))
    if rule.refused:
        raise _Refusal("not supported in this version", rule.refused)
    if name.startswith(HYPERVISOR):
        _check_enabled(name.removeprefix(HYPERVISOR), config)
    if rule.paths and not _found_by(getattr(config.hypervisor, rule.paths), text):
        raise _Refusal(
            f"{show_string(text)} is not a path that pods may name",
            f"add it to {rule.paths} of [hypervisor.qemu]",
        )
    try:
        if rule.parse is None:
            return rule.where, value_of(_type(rule.where), text)
        return rule.where, rule.parse(text, _so_far(rule.where, config))
    except ValueError as err:
        raise _Refusal(f"want {err}, got {show_string(text)}") from None


def _check_enabled(key: str, config: Config) -> None:
    if not any(re.fullmatch(pattern, key) for pattern in config.hypervisor.enable_annotations):
        raise _Refusal("pods may not set it", f'add "{key}" to enable_annotations of [hypervisor.qemu]')


def _found_by(patterns: tuple[str, ...], path: str) -> bool:
    """Whether a pattern, expanded on this host, gives exactly this path: `*` ends at a slash, `..` leads nowhere."""
    from glob import glob  # most pods name no path

    return any(path in glob(pattern) for pattern in patterns)


def _type(where: KeyPath) -> Any:
    *header, name = map(str, where)
    return annotation(SECTIONS[".".join(header)], name)


def _so_far(where: KeyPath, config: Config) -> object:
    return getattr(getattr(config, str(where[0])), str(where[-1]))


def _table(where: KeyPath, value: object) -> Table:
    for name in reversed(where):
        value = {str(name): value}
    assert isinstance(value, dict)
    return value


def _advice(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, RULES, n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else "remove it"

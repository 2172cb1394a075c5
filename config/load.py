"""Find the configuration, read it with its drop-ins, and turn it into typed sections: all of it or one error.

The order of places: what the caller was given (containerd's runtime option `ConfigPath`), the environment's
`KATA_CONF_FILE`, `/etc/kata-py`, `/usr/share/defaults/kata-py`. A file named in one of the first two ways
must exist; when no file exists in the usual places, the built-in defaults are the configuration. What a pod's
annotations change comes over that, and last the pod's size.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from config.decode import decode, unread_sections
from config.effects import check_effects
from config.errors import ConfigError, Problem
from config.schema import ANNOTATION_PREFIX, Config
from config.sizing import PodResources, size
from config.tree import Report, Table, Tree
from config.validate import HostLimits, adjust_and_validate

DEFAULT_PLACES = (
    "/etc/kata-py/configuration.toml",
    "/usr/share/defaults/kata-py/configuration.toml",
)
ENVIRONMENT_KEY = "KATA_CONF_FILE"
DROP_IN_FOLDER = "config.d"


class LoadedConfig(Struct, frozen=True):
    """A configuration that can be used.

    `path` is the base file without symbolic links, None when the built-in defaults apply; `drop_ins` are the
    files that were merged over it, in that order; `origins` tells what set each key that is set, by its dotted
    name; `warnings` are lines for the log, none of which keeps a sandbox from starting.
    """

    config: Config
    path: Path | None
    drop_ins: tuple[Path, ...]
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


def load(
    explicit: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    host: HostLimits | None = None,
    places: tuple[str, ...] = DEFAULT_PLACES,
    annotations: Mapping[str, str] | None = None,
    resources: PodResources | None = None,
    machine_type: str = "",
) -> LoadedConfig:
    """Load the configuration that applies; `env` and `host` default to this process and this machine.

    `annotations` are all that the pod has, `resources` are its limits, and a `machine_type` is that of its image, which
    somebody has seen to be another one. Raises `ConfigError`, with every problem of
    every file, when there is anything that cannot be used; with every problem of the annotations, when the files are
    fine without them; and last of the pod's limits.
    """
    path = _find(explicit, os.environ if env is None else env, places)
    tree, drop_ins = _read(path) if path else (Tree(None, {}), ())
    host = host or HostLimits.of_this_host()
    config, without_effect = _settle(tree, host, Report(tree))
    if any(name.startswith(ANNOTATION_PREFIX) for name in annotations or ()):
        from config.annotations import annotate  # 3 ms that few pods need to pay

        report = Report(tree)
        annotate(tree, annotations or {}, config, report)
        config, without_effect = _settle(tree, host, report)
    if machine_type:
        from config.foreign import choose

        choose(tree, machine_type, "the image's architecture")
        config, without_effect = _settle(tree, host, Report(tree))
    if resources is not None and config.runtime.static_sandbox_resource_mgmt:
        size(tree, resources, config)
        config, without_effect = _settle(tree, host, Report(tree))
    return LoadedConfig(config, path, drop_ins, tree.origins(), _warnings(path, tree, places, without_effect))


def _settle(tree: Tree, host: HostLimits, report: Report) -> tuple[Config, list[Problem]]:
    """The configuration that a tree is, and remarks about keys without effect or turned off. Raises `ConfigError`."""
    config = adjust_and_validate(decode(tree.table, report), host, report)
    without_effect = check_effects(config, report)
    report.raise_any()
    return config, [*report.remarks, *without_effect]


def _warnings(
    path: Path | None, tree: Tree, places: tuple[str, ...], without_effect: list[Problem]
) -> tuple[str, ...]:
    lines = []
    if path is None:
        lines.append(f"no configuration file at {' or '.join(places)}: the built-in defaults apply")
    if unread := unread_sections(tree.table):
        lines.append(f"{path}: nothing reads the sections {', '.join(unread)}")
    return (*lines, *map(str, without_effect))


def _find(explicit: Path | None, env: Mapping[str, str], places: tuple[str, ...]) -> Path | None:
    if explicit is not None:
        return _canonical(explicit, "")
    if named := env.get(ENVIRONMENT_KEY):
        return _canonical(Path(named), f"{ENVIRONMENT_KEY} in the environment names it")
    for place in places:
        # A dangling link is a broken installation, not a reason to look elsewhere.
        if os.path.lexists(place):
            return _canonical(Path(place), "")
    return None


def _canonical(path: Path, hint: str) -> Path:
    """Resolve symbolic links; drop-ins are looked up beside the file that a link leads to."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as err:  # RuntimeError: a loop of links, before Python 3.13
        raise ConfigError((Problem(path, "", _reason(err), hint),)) from err


def _read(path: Path) -> tuple[Tree, tuple[Path, ...]]:
    """Read the base file and everything in `config.d` beside it. Unreadable files are reported together."""
    problems: list[Problem] = []
    base = _parse(path, problems)
    drop_ins = _drop_ins(path.parent / DROP_IN_FOLDER, problems)
    tables = [(file, _parse(file, problems)) for file in drop_ins]
    if problems:
        raise ConfigError(tuple(problems))
    tree = Tree(path, base)
    for file, table in tables:
        tree.merge(file, table)
    return tree, drop_ins


def _drop_ins(folder: Path, problems: list[Problem]) -> tuple[Path, ...]:
    """All regular files, whatever their suffix, in the byte order of their names; links are left out."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return ()
    except OSError as err:
        problems.append(Problem(folder, "", _reason(err)))
        return ()
    return tuple(folder / name for name in sorted(names, key=os.fsencode))


def _parse(path: Path, problems: list[Problem]) -> Table:
    try:
        if not path.is_file():  # opening a FIFO would wait for ever
            problems.append(Problem(path, "", "is not a regular file"))
            return {}
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as err:
        problems.append(Problem(path, "", f"not valid TOML: {err}"))
    except UnicodeDecodeError as err:
        problems.append(Problem(path, "", f"not valid TOML: byte {err.start} is not UTF-8"))
    except RecursionError:
        problems.append(Problem(path, "", "not valid TOML: nested too deeply"))
    except OSError as err:
        problems.append(Problem(path, "", _reason(err)))
    return {}


def _reason(err: Exception) -> str:
    if isinstance(err, FileNotFoundError):
        return "does not exist"
    return f"cannot be read: {err.strerror if isinstance(err, OSError) else err}"

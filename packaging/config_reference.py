"""Write docs/configuration.md from the schema, or prove with `--check` that it is up to date."""

import argparse
import sys
from pathlib import Path

from msgspec.structs import FieldInfo, fields

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config.describe import wanted  # noqa: E402  (found through the line above)
from config.schema import SECTIONS, KeyInfo, Section, info  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Made from config/schema/ by packaging/config_reference.py; edit there. -->

kata-py reads TOML files with the sections and keys of Kata Containers, and some keys of its own. A Kata
file can be used as it is: whatever this version cannot do is either refused by name or named in a
warning, never dropped in silence when it would matter.

## Which file

The first of these that is there:

1. the path in containerd's runtime options (`ConfigPath`);
2. the path in the environment variable `KATA_CONF_FILE`;
3. `/etc/kata-py/configuration.toml`;
4. `/usr/share/defaults/kata-py/configuration.toml`.

A file that the first two name has to exist. With no file in the last two places either, the defaults
below apply, and a warning says so. (Kata 4.1 looks at the environment first, and only lets it name a
shipped file.)

## Drop-ins

Every regular file in the folder `config.d` beside the file, whatever its suffix, is merged over it, in
the byte order of the names; later files win. Symbolic links in that folder are left out; when the file
itself is a link, the folder is looked for where the link leads. Tables are merged key by key; a list, as
any other value, replaces the whole old one.

## What pods may change

Annotations of a pod that begin with `io.katacontainers.config.` are laid over the files, and judged as keys in a file
are. containerd hands them on when the runtime's `pod_annotations` names them (`["io.katacontainers.*"]`).

| annotation | sets |
|---|---|
| `io.katacontainers.config.hypervisor.KEY` | a key of `[hypervisor.qemu]`, if `enable_annotations` lists it there |
| `io.katacontainers.config.runtime.KEY` | a key of `[runtime]`; `create_container_timeout` of `[agent.kata]` |
| `io.katacontainers.config.agent.KEY` | a key of `[agent.kata]`; `policy` is base64 |

Each regular expression of `enable_annotations` has to match a whole name. (Kata looks for a match anywhere in the
name, where `path` allows `jailer_path` too.) Programs, directories and devices must also be found by the matching
`valid_*` key, whose shell patterns are expanded on the host. `kernel_params` replaces the words of the same name and
adds the others; `virtio_fs_extra_args`, `kernel_modules` (separated by `;`) and `experimental` add to the list;
`default_memory` may have a unit, as in `2Gi`. An annotation that is unknown, or that the pod may not use, keeps the
pod from starting, with one line for each:

    annotation io.katacontainers.config.hypervisor.path: pods may not set it (add "path" to enable_annotations ...)

## Mistakes

All mistakes of all files are reported at once, one per line, with the file that set the key:

    /etc/kata-py/config.d/20-size.toml: hypervisor.qemu.memory_slots: want int 0..256, got 'ten'
    /etc/kata-py/configuration.toml: hypervisor.qemu.kernle: unknown key (did you mean kernel?)

Unknown keys are mistakes. `[hypervisor.*]` and `[agent.*]` sections other than the ones that `[runtime]`
chooses are not read, and other top-level sections only cause a warning. An empty string in a key with a
fixed set of values means its default. Files named in the configuration have to exist, by absolute path,
when it is read; symbolic links are resolved then.

## Keys

The column *effect* says what a key does in this version:

| effect | meaning |
|---|---|
| yes | the value is used |
| refused | a value other than the default is an error, because it would be unsafe to go on without |
| warns | accepted; a value other than the default has no effect, which a warning says |
| none | accepted, and changes nothing that could be noticed |

Whatever is not used has its reason in the last column.
"""

EFFECT_WORDS = {"now": "yes", "refused": "refused", "warned": "warns", "ignored": "none"}
WHY_WORDS = {"refused": "Refused", "warned": "No effect", "ignored": "Not used"}


def main() -> int:
    """Write or check the reference; 1 when the check finds it out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only compare; fail when the file is out of date"
    )
    checking = parser.parse_args().check
    text = reference()
    if not checking:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print(
            f"{TARGET.relative_to(ROOT)} is out of date: run packaging/config_reference.py", file=sys.stderr
        )
        return 1
    return 0


def reference() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(section(header, kind) for header, kind in SECTIONS.items())


def section(header: str, kind: type[Section]) -> str:
    """One section's heading and table, keys with an effect first."""
    keys = [
        (field, info(kind, field.name)) for field in fields(kind) if not isinstance(field.default, Section)
    ]
    keys.sort(key=lambda entry: list(EFFECT_WORDS).index(entry[1].effect))
    rows = [row(field, said) for field, said in keys]
    return "\n".join(
        [
            f"\n### `[{header}]`\n",
            "| key | type | default | effect | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def row(field: FieldInfo, said: KeyInfo) -> str:
    """One key as a line of the table."""
    default = "required" if field.required else toml(field.default)
    kind = wanted(field.type) + (f", {said.unit}" if said.unit else "")
    meaning = said.description
    if said.why:
        meaning += f" {WHY_WORDS[said.effect]}: {said.why}."
    cells = (f"`{field.name}`", kind, default, EFFECT_WORDS[said.effect], meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def toml(value: object) -> str:
    """A default as it would be written in the file."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return "`[]`" if value == () else f"`{value}`"


if __name__ == "__main__":
    sys.exit(main())

"""`kata-py config show`: every key with its value and origin, of a file or of a running sandbox."""

from __future__ import annotations

from pathlib import Path

import msgspec
import typer

from cli import output
from config import ConfigError, load
from config.show import Setting, decode, settings
from shim import paths


def show(file: Path | None, *, sandbox: str | None, as_json: bool) -> None:
    """Prints the settings; exits with status 1 and one line for each problem when there are none."""
    if file is not None and sandbox is not None:
        output.fail("a running sandbox has read its files already: name FILE or --sandbox, not both")
        raise typer.Exit(1)
    found = _of_new_sandboxes(file) if sandbox is None else _of(sandbox)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=1))
    else:
        typer.echo("\n".join(map(str, found)))


def _of_new_sandboxes(file: Path | None) -> list[Setting]:
    try:
        return settings(load(file))
    except ConfigError as error:
        output.show_problems(error)
        raise typer.Exit(1) from None


def _of(sandbox: str) -> list[Setting]:
    if not paths.valid_id(sandbox):
        output.fail(f"{sandbox!r} is not the id of a sandbox")
        raise typer.Exit(1)
    path = Path(paths.run_dir(sandbox), paths.CONFIG_FILE)
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        output.fail(f"no sandbox {sandbox} runs here: there is no {path}")
    except (OSError, msgspec.MsgspecError) as error:
        output.fail(f"{path} cannot be read: {error}")
    raise typer.Exit(1)

"""From the command line to the engine's verbs, and back to output and exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from oci_engine.container import Engine
from oci_engine.errors import CannotExecute, EngineError
from oci_engine.options import CreateOptions, ExecOptions, Streams
from runk.arguments import UPDATES, parser
from runk.log import Log
from runk.signals import parse_signal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

VERSION = "0.1.0"
_FAILED = 1


def run(argv: list[str]) -> int:
    """Returns the exit status: that of the container's process where there is one to wait for, else 0 or 1."""
    top = parser()
    options = top.parse_args(argv)
    if options.version:
        _print(f"runk version {VERSION}\nspec: 1.2.1\n")
        return 0
    if not options.verb:
        top.print_usage(sys.stderr)
        return _FAILED
    log = Log(options.log, json_lines=options.log_format == "json", debug=options.debug)
    log.debug(" ".join(argv))
    try:
        _refuse(options)
        return _VERBS[options.verb](options, Engine(options.root), log)
    except CannotExecute as err:
        log.error(str(err))
        return err.status
    except (EngineError, OSError, ValueError) as err:
        log.error(str(err))
        return _FAILED


def _refuse(options: argparse.Namespace) -> None:
    if options.systemd_cgroup:
        raise EngineError("--systemd-cgroup: control groups are not made by systemd here; use cgroupfs")
    if options.rootless == "true" or os.geteuid() != 0:
        raise EngineError("containers without root are not supported; run it as root")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _create_options(options: argparse.Namespace, console_socket: str) -> CreateOptions:
    return CreateOptions(
        streams=_streams(options, console_socket),
        pid_file=options.pid_file,
        no_pivot=options.no_pivot,
        no_new_keyring=options.no_new_keyring,
    )


def _streams(options: argparse.Namespace, console_socket: str) -> Streams:
    return Streams(preserve_fds=options.preserve_fds, console_socket=console_socket)


def _create(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    engine.create(options.id, options.bundle, _create_options(options, options.console_socket))
    return 0


def _run(options: argparse.Namespace, engine: Engine, log: Log) -> int:
    from runk import foreground

    bundle = _read_json(os.path.join(options.bundle, "config.json"))
    with ExitStack() as stack:
        console = None
        path = options.console_socket
        if _wants_terminal(bundle.get("process")) and not path and not options.detach:
            console = foreground.ConsoleSocket(stack)
            path = console.path
        pid = engine.create(options.id, options.bundle, _create_options(options, path))
        try:
            master = console.terminal() if console else -1
            if master >= 0 and os.isatty(0):
                foreground.set_size(master, foreground.own_size())
            engine.start(options.id)
        except BaseException:
            engine.delete(options.id, force=True)
            raise
        if options.detach:
            return 0
        try:
            return foreground.wait(pid, master)
        finally:
            if not options.keep:
                for complaint in engine.delete(options.id, force=True):
                    log.warning(complaint)


def _wants_terminal(process: object) -> bool:
    return isinstance(process, dict) and bool(process.get("terminal"))


def _exec(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    from runk import foreground
    from runk.exec_process import process_document

    document = process_document(options, engine.load(options.id).spec)
    with ExitStack() as stack:
        console = None
        path = options.console_socket
        if _wants_terminal(document) and not path and not options.detach:
            console = foreground.ConsoleSocket(stack)
            path = console.path
            rows, columns = foreground.own_size()
            if rows and columns and "consoleSize" not in document:
                document["consoleSize"] = {"height": rows, "width": columns}
        pid, _ = engine.exec(
            options.id, document, ExecOptions(streams=_streams(options, path), pid_file=options.pid_file)
        )
        if options.detach:
            return 0
        return foreground.wait(pid, console.terminal() if console else -1)


def _start(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    engine.start(options.id)
    return 0


def _state(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    from runk.tables import state_json

    _print(json.dumps(state_json(engine, engine.load(options.id)), indent=2) + "\n")
    return 0


def _kill(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    engine.kill(options.id, parse_signal(options.signal), everyone=options.all)
    return 0


def _delete(options: argparse.Namespace, engine: Engine, log: Log) -> int:
    for complaint in engine.delete(options.id, force=options.force):
        log.warning(complaint)
    return 0


def _pause(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    engine.pause(options.id)
    return 0


def _resume(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    engine.resume(options.id)
    return 0


def _list(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    from runk.tables import list_text

    _print(list_text(engine, options.format, quiet=options.quiet))
    return 0


def _ps(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    from runk.tables import ps_text

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    _print(ps_text(engine.pids(options.id), options.format, arguments))
    return 0


def _spec(options: argparse.Namespace, _engine: Engine, _log: Log) -> int:
    from runk.default_spec import default_spec

    path = os.path.join(options.bundle, "config.json")
    try:
        with open(path, "x") as file:
            file.write(json.dumps(default_spec(), indent=4) + "\n")
    except FileExistsError:
        raise EngineError(f"{path} exists already; remove it first") from None
    return 0


def _features(_options: argparse.Namespace, _engine: Engine, _log: Log) -> int:
    from runk.features import features

    _print(json.dumps(features(VERSION), indent=2) + "\n")
    return 0


def _events(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    pause_s = parse_interval(options.interval)
    while True:
        data = engine.stats(options.id)
        _print(json.dumps({"type": "stats", "id": options.id, "data": data}) + "\n")
        if options.stats:
            return 0
        time.sleep(pause_s)  # the interval that was asked for


def parse_interval(text: str) -> float:
    """Seconds. Raises ValueError."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
        number = text.removesuffix(unit)
        if number != text and number.isdigit() and int(number) > 0:
            return int(number) * factor
    raise ValueError(f"--interval: want a time as in 5s or 500ms, got {text!r}")


def _update(options: argparse.Namespace, engine: Engine, _log: Log) -> int:
    resources = _read_json(options.resources) if options.resources else _from_options(options)
    engine.update(options.id, resources)
    return 0


def _from_options(options: argparse.Namespace) -> dict[str, object]:
    places = {
        "cpu-period": ("cpu", "period"), "cpu-quota": ("cpu", "quota"), "cpu-share": ("cpu", "shares"),
        "cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems"), "memory": ("memory", "limit"),
        "memory-reservation": ("memory", "reservation"), "memory-swap": ("memory", "swap"),
        "pids-limit": ("pids", "limit"), "blkio-weight": ("blockIO", "weight"),
    }  # fmt: skip
    resources: dict[str, dict[str, object]] = {}
    for name, _ in UPDATES:
        value = getattr(options, name.replace("-", "_"))
        if value is not None:
            group, key = places[name]
            resources.setdefault(group, {})[key] = value
    if not resources:
        raise EngineError("update: no limit is given")
    return dict(resources)


def _read_json(path: str) -> dict[str, object]:
    try:
        if path == "-":
            document = json.load(sys.stdin)
        else:
            with open(path) as file:
                document = json.load(file)
    except ValueError as err:
        raise EngineError(f"{path}: is no JSON document: {err}") from None
    if not isinstance(document, dict):
        raise EngineError(f"{path}: is no JSON object")
    return document


_VERBS: dict[str, Callable[[argparse.Namespace, Engine, Log], int]] = {
    "create": _create, "start": _start, "state": _state, "kill": _kill, "delete": _delete, "run": _run,
    "exec": _exec, "pause": _pause, "resume": _resume, "list": _list, "ps": _ps, "spec": _spec,
    "features": _features, "events": _events, "update": _update,
}  # fmt: skip

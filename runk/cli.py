"""From the command line to the engine's verbs, and back to output and exit status."""

from __future__ import annotations

import os
import sys
import time

from oci_engine import json_text
from oci_engine.container import Engine
from oci_engine.errors import CannotExecute, EngineError
from oci_engine.options import CreateOptions, ExecOptions, Streams
from oci_engine.undo import Undo
from runk.arguments import UPDATES, UsageError, parse
from runk.log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runk.arguments import Options

VERSION = "0.1.0"
#: The youngest version of the specification whose fields are read.
SPEC_VERSION = "1.3.0"
_FAILED = 1


def run(argv: list[str]) -> int:
    """Returns the exit status: that of the container's process where there is one to wait for, else 0 or 1."""
    try:
        options = parse(argv)
    except UsageError as err:
        print(f"runk: {err}", file=sys.stderr)  # noqa: T201
        return _FAILED
    if options.help:
        _print(options.help + "\n")
        return 0
    if options.version:
        _print(f"runk version {VERSION}\nspec: {SPEC_VERSION}\n")
        return 0
    if not options.verb:
        print("runk: no verb is given; see runk --help", file=sys.stderr)  # noqa: T201
        return _FAILED
    log = Log(options.log, json_lines=options.log_format == "json", debug=options.debug)
    log.debug(" ".join(argv))
    try:
        return _VERBS[options.verb](options, Engine(_root(options), warn=log.warning), log)
    except CannotExecute as err:
        log.error(str(err))
        return err.status
    except (EngineError, OSError, ValueError) as err:
        log.error(str(err))
        return _FAILED


def _is_rootless(options: Options) -> bool:
    """Root of a user namespace is, unless control groups have been delegated to it."""
    if options.rootless != "auto":
        return bool(options.rootless == "true")
    if os.geteuid() != 0:
        return True
    return _in_user_namespace() and not os.access("/sys/fs/cgroup", os.W_OK)


def _in_user_namespace() -> bool:
    """Whether root here is another one than the host's."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", str((1 << 32) - 1)]


def _root(options: Options) -> str:
    """Where states are. Raises EngineError."""
    if options.root:
        return str(options.root)
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    # Root of a user namespace may well not write to /run, as below a Podman without root.
    if os.geteuid() == 0 and not (folder.startswith("/") and _in_user_namespace()):
        return "/run/runk"
    if not folder.startswith("/"):
        raise EngineError(
            "there is no folder for the state of containers; set XDG_RUNTIME_DIR, or give --root"
        )
    return f"{folder}/runk"


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _create_options(options: Options, console_socket: str) -> CreateOptions:
    rootless = _is_rootless(options)
    if rootless and options.systemd_cgroup:
        raise EngineError("--systemd-cgroup: containers without root get no control groups; leave it out")
    return CreateOptions(
        streams=_streams(options, console_socket),
        pid_file=options.pid_file,
        no_pivot=options.no_pivot,
        no_new_keyring=options.no_new_keyring,
        systemd_cgroup=options.systemd_cgroup,
        rootless=rootless,
    )


def _streams(options: Options, console_socket: str) -> Streams:
    return Streams(preserve_fds=options.preserve_fds, console_socket=console_socket)


def _create(options: Options, engine: Engine, _log: Log) -> int:
    engine.create(options.id, options.bundle, _create_options(options, options.console_socket))
    return 0


def _run(options: Options, engine: Engine, log: Log) -> int:
    from runk import foreground

    bundle = _read_json(os.path.join(options.bundle, "config.json"))
    with Undo() as undo:
        console = None
        path = options.console_socket
        if _wants_terminal(bundle.get("process")) and not path and not options.detach:
            console = foreground.ConsoleSocket(undo)
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


def _exec(options: Options, engine: Engine, _log: Log) -> int:
    from runk import foreground
    from runk.exec_process import process_document

    document = process_document(options, engine.load(options.id).spec)
    with Undo() as undo:
        console = None
        path = options.console_socket
        if _wants_terminal(document) and not path and not options.detach:
            console = foreground.ConsoleSocket(undo)
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


def _start(options: Options, engine: Engine, _log: Log) -> int:
    engine.start(options.id)
    return 0


def _state(options: Options, engine: Engine, _log: Log) -> int:
    from runk.tables import state_json

    _print(json_text.pretty(state_json(engine, engine.load(options.id))) + "\n")
    return 0


def _kill(options: Options, engine: Engine, _log: Log) -> int:
    from runk.signals import parse_signal

    engine.kill(options.id, parse_signal(options.signal or "SIGTERM"), everyone=options.all)
    return 0


def _delete(options: Options, engine: Engine, log: Log) -> int:
    for complaint in engine.delete(options.id, force=options.force):
        log.warning(complaint)
    return 0


def _pause(options: Options, engine: Engine, _log: Log) -> int:
    engine.pause(options.id)
    return 0


def _resume(options: Options, engine: Engine, _log: Log) -> int:
    engine.resume(options.id)
    return 0


def _list(options: Options, engine: Engine, _log: Log) -> int:
    from runk.tables import list_text

    _print(list_text(engine, options.format, quiet=options.quiet))
    return 0


def _ps(options: Options, engine: Engine, _log: Log) -> int:
    from runk.tables import ps_text

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    _print(ps_text(engine.pids(options.id), options.format, arguments))
    return 0


def _spec(options: Options, _engine: Engine, _log: Log) -> int:
    from runk.default_spec import default_spec, rootless_spec

    path = os.path.join(options.bundle, "config.json")
    try:
        with open(path, "x") as file:
            file.write(
                json_text.pretty(rootless_spec() if options.rootless_spec else default_spec(), 4) + "\n"
            )
    except FileExistsError:
        raise EngineError(f"{path} exists already; remove it first") from None
    return 0


def _features(_options: Options, _engine: Engine, _log: Log) -> int:
    from runk.features import features

    _print(json_text.pretty(features(VERSION, SPEC_VERSION)) + "\n")
    return 0


def _events(options: Options, engine: Engine, _log: Log) -> int:
    pause_s = parse_interval(options.interval)
    while True:
        data = engine.stats(options.id)
        _print(json_text.dumps({"type": "stats", "id": options.id, "data": data}) + "\n")
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


def _update(options: Options, engine: Engine, _log: Log) -> int:
    resources = _read_json(options.resources) if options.resources else _from_options(options)
    engine.update(options.id, resources)
    return 0


def _from_options(options: Options) -> dict[str, object]:
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
            document = json_text.loads(sys.stdin.read())
        else:
            with open(path) as file:
                document = json_text.loads(file.read())
    except ValueError as err:
        raise EngineError(f"{path}: is no JSON document: {err}") from None
    if not isinstance(document, dict):
        raise EngineError(f"{path}: is no JSON object")
    return document


_VERBS: dict[str, Callable[[Options, Engine, Log], int]] = {
    "create": _create, "start": _start, "state": _state, "kill": _kill, "delete": _delete, "run": _run,
    "exec": _exec, "pause": _pause, "resume": _resume, "list": _list, "ps": _ps, "spec": _spec,
    "features": _features, "events": _events, "update": _update,
}  # fmt: skip

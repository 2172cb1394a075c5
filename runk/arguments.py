"""The command line, as callers of OCI runtimes write it."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="runk", description="Run containers on this host, as the OCI's runtime specification has it.",
        allow_abbrev=False,
    )  # fmt: skip
    top.add_argument(
        "--root", default="/run/runk", help="where the state of containers is kept (default: %(default)s)"
    )
    top.add_argument("--log", metavar="FILE", help="append messages to this file")
    top.add_argument("--log-format", choices=("text", "json"), default="text")
    top.add_argument("--debug", action="store_true", help="say more in the log")
    top.add_argument("--systemd-cgroup", action="store_true", help="not supported, and refused")
    top.add_argument(
        "--rootless", choices=("true", "false", "auto"), default="auto", help="`true` is refused"
    )
    top.add_argument("--version", "-v", action="store_true")
    # With its name given, argparse does not look up how wide the terminal is, which costs a tenth of a call.
    verbs = top.add_subparsers(dest="verb", metavar="VERB", prog="runk")

    create = _verb(verbs, "create", "make a container")
    run = _verb(verbs, "run", "make a container, start it, and wait for its end")
    for verb in (create, run):
        verb.add_argument(
            "--bundle", "-b", default=".", help="the folder with config.json (default: this one)"
        )
        verb.add_argument(
            "--no-pivot", action="store_true", help="for a host whose root is the initial ramdisk"
        )
        verb.add_argument("--no-new-keyring", action="store_true")
        _streams(verb)
    run.add_argument("--detach", "-d", action="store_true", help="do not wait")
    run.add_argument("--keep", action="store_true", help="do not delete it at its end")

    execute = _verb(verbs, "exec", "run one more process in a container")
    _streams(execute)
    execute.add_argument("--detach", "-d", action="store_true")
    execute.add_argument("--process", "-p", metavar="FILE", help="the process as JSON")
    execute.add_argument("--tty", "-t", action="store_true")
    execute.add_argument("--cwd")
    execute.add_argument("--env", "-e", action="append", default=[], metavar="NAME=VALUE")
    execute.add_argument("--user", "-u", metavar="UID[:GID]")
    execute.add_argument("--additional-gids", "-g", action="append", default=[], type=int, metavar="GID")
    execute.add_argument("--cap", "-c", action="append", default=[], metavar="CAP_NAME")
    execute.add_argument("--no-new-privs", action="store_true")
    execute.add_argument("--apparmor", default="", metavar="PROFILE")
    execute.add_argument("--process-label", default="", metavar="LABEL")
    execute.add_argument("command", nargs=argparse.REMAINDER)

    _verb(verbs, "start", "start a container that was created")
    _verb(verbs, "state", "tell a container's state as JSON")
    _verb(verbs, "pause", "stop all processes of a container for a while")
    _verb(verbs, "resume", "let them go on")
    kill = _verb(verbs, "kill", "send a signal to a container")
    kill.add_argument("--all", "-a", action="store_true", help="to all of its processes")
    kill.add_argument("signal", nargs="?", default="SIGTERM")
    delete = _verb(verbs, "delete", "remove a container that has stopped")
    delete.add_argument(
        "--force", "-f", action="store_true", help="also one that runs, and one that is not there"
    )
    listing = verbs.add_parser("list", help="list containers", allow_abbrev=False)
    listing.add_argument("--format", "-f", choices=("table", "json"), default="table")
    listing.add_argument("--quiet", "-q", action="store_true", help="only the ids")
    ps = _verb(verbs, "ps", "list the processes of a container")
    ps.add_argument("--format", "-f", choices=("table", "json"), default="table")
    ps.add_argument("arguments", nargs=argparse.REMAINDER, help="for the host's ps (default: -ef)")
    spec = verbs.add_parser("spec", help="write a specification to begin with", allow_abbrev=False)
    spec.add_argument("--bundle", "-b", default=".")
    verbs.add_parser("features", help="tell what specifications may ask for")
    events = _verb(verbs, "events", "tell statistics")
    events.add_argument("--stats", action="store_true", help="once, then end")
    events.add_argument(
        "--interval", default="5s", help="between two of them, as in 5s or 500ms (default: %(default)s)"
    )
    update = _verb(verbs, "update", "change limits")
    update.add_argument("--resources", "-r", metavar="FILE", help="as JSON; - is the standard input")
    for name, kind in UPDATES:
        update.add_argument(f"--{name}", type=kind)
    return top


#: Options of `update` that stand for one limit each.
UPDATES: tuple[tuple[str, type], ...] = (
    ("cpu-period", int), ("cpu-quota", int), ("cpu-share", int), ("cpuset-cpus", str), ("cpuset-mems", str),
    ("memory", int), ("memory-reservation", int), ("memory-swap", int), ("pids-limit", int),
    ("blkio-weight", int),
)  # fmt: skip


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.add_argument("id", help="the container")
    return verb


def _streams(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--console-socket", default="", metavar="PATH", help="where the terminal is sent to")
    verb.add_argument("--pid-file", default="", metavar="PATH")
    verb.add_argument(
        "--preserve-fds", type=int, default=0, metavar="N", help="file descriptors 3 to N+2 stay open"
    )

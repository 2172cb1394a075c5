"""The shim's command line as containerd calls it: flags in Go's style, then one action word.

Every pod's start and end run through here, so this module imports nothing that it does not need; each action
imports its own module. The only place of the package that exits the process.
"""

import os
import sys

# Not from `typing`, whose import takes as long as the whole interpreter's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

USAGE = """\
usage: containerd-shim-kata-py-v2 [flags] start|delete
       containerd-shim-kata-py-v2 -v | -info | -h

A containerd shim v2 that runs every pod in its own QEMU microVM. containerd starts it; set
`runtime_type = "io.containerd.kata-py.v2"` there, or try `ctr run --runtime io.containerd.kata-py.v2 ...`.

flags (as containerd passes them):
  -namespace NAME        containerd namespace of the container
  -id ID                 container id
  -address PATH          containerd's gRPC socket
  -publish-binary PATH   containerd's binary (events are published over ttRPC instead)
  -bundle PATH           bundle directory (default: the working directory)
  -socket PATH           ignored: the address is derived from the id
  -debug                 debug logging
  -v, -version           print the version
  -info                  write a containerd.types.RuntimeInfo message to stdout
  -h, -help              print this text
"""

_VALUE_FLAGS = ("namespace", "id", "address", "publish-binary", "bundle", "socket")
_BOOL_FLAGS = ("debug", "v", "version", "info", "h", "help")
_TRUE, _FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")


class UsageError(Exception):
    """The command line cannot be understood; the text says which word."""


class Flags:
    """The parsed command line. Absent strings are empty."""

    def __init__(self) -> None:
        self.namespace = self.id = self.address = self.publish_binary = self.bundle = self.socket = ""
        self.debug = self.version = self.info = self.help = False
        self.action = ""


def parse(argv: "Sequence[str]") -> Flags:
    """Parse flags as Go's `flag` package does: one or two dashes, `-name value` or `-name=value`, booleans alone.

    Raises:
        UsageError: unknown flag, missing or malformed value, more than one action.
    """
    flags = Flags()
    words = list(argv)
    actions: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--" or not word.startswith("-") or word == "-":
            actions += words if word == "--" else [word]
            if word == "--":
                break
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        if name in _BOOL_FLAGS:
            if has_value and value not in _TRUE + _FALSE:
                raise UsageError(f"invalid boolean value {value!r} for -{name}")
            _set_bool(flags, name, not has_value or value in _TRUE)
        elif name in _VALUE_FLAGS:
            if not has_value:
                if not words:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = words.pop(0)
            setattr(flags, name.replace("-", "_"), value)
        else:
            raise UsageError(f"flag provided but not defined: -{name}")
    if len(actions) > 1:
        raise UsageError(f"one action expected, got: {' '.join(actions)}")
    flags.action = actions[0] if actions else ""
    return flags


def _set_bool(flags: Flags, name: str, value: bool) -> None:
    long_name = {"v": "version", "h": "help"}.get(name, name)
    setattr(flags, long_name, value)


def main() -> "NoReturn":
    """Run the program with `sys.argv`; exits with 0, 1 (failed) or 2 (wrong usage)."""
    try:
        flags = parse(sys.argv[1:])
    except UsageError as err:
        _fail(f"{err}\n{USAGE}", 2)
    code = 0
    try:
        code = _dispatch(flags)
    except (OSError, ValueError) as err:
        _fail(f"{flags.action or 'shim'}: {err}", 1)
    sys.stdout.flush()
    # Nothing is left to finalise, and tearing the interpreter down costs a few milliseconds of every pod's start.
    os._exit(code)


def _dispatch(flags: Flags) -> int:
    if flags.help:
        sys.stdout.write(USAGE)
    elif flags.version:
        from shim import VERSION
        from shim.info import revision

        sys.stdout.write(
            f"containerd-shim-kata-py-v2:\n  Version:  {VERSION}\n  Revision: {revision() or 'unknown'}\n"
            f"  Python:   {sys.version.split()[0]}\n"
        )
    elif flags.info:
        from shim.bootstrap import read_stdin
        from shim.info import runtime_info

        os.write(1, runtime_info(read_stdin()))
    elif flags.action == "start":
        from shim.start import start

        start(flags)
    elif flags.action == "delete":
        from shim.delete import delete

        os.write(1, delete(flags))
    else:
        problem = f"unknown action {flags.action!r}" if flags.action else "no action given"
        _fail(f"{problem}: this program is started by containerd\n{USAGE}", 2)
    return 0


def _fail(message: str, code: int) -> "NoReturn":
    # containerd goes on in the same line: with the exit status.
    end = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"containerd-shim-kata-py-v2: {message.rstrip()}{end}")
    sys.stderr.flush()
    os._exit(code)

"""The command line, as callers of OCI runtimes write it.

Read out of a table by a few lines of its own: `argparse` makes all verbs at each call, and looks up how wide the
terminal is for each option, which together took as long as an interpreter's start.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_TRUE, _FALSE = ("true", "1"), ("false", "0")


class UsageError(Exception):
    """The command line cannot be understood; the text says which word, and where help is."""


class Options:
    """What a command line asks for. Each option is an attribute, dashes as underscores."""

    help = ""
    verb = ""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: object) -> None: ...


class Flag:
    """`kind` makes the value from its text; None is a flag without a value. A flag of `many` makes a list."""

    def __init__(
        self,
        names: str,
        text: str = "",
        kind: Callable[[str], object] | None = None,
        *,
        default: object = None,
        value: str = "",
        choices: tuple[str, ...] = (),
        many: bool = False,
        attribute: str = "",
    ) -> None:
        self.name, _, self.short = names.partition(" ")
        self.attribute = attribute or self.name.replace("-", "_")
        self.text = text
        self.kind = kind
        self.default = False if kind is None else default
        self.value = value or "|".join(choices) or self.name.upper()
        self.choices = choices
        self.many = many


class Verb:
    """`words` are the positional words: one that ends with `?` may be missing, one with `*` takes all
    that follows the word before it, flags too."""

    def __init__(self, text: str, *flags: Flag, words: tuple[str, ...] = ("id",)) -> None:
        self.text = text
        self.flags = flags
        self.words = words


FLAGS = (
    Flag(
        "root", "where states are kept (default: /run/runk, without root $XDG_RUNTIME_DIR/runk)", str, default="",
        value="FOLDER",
    ),
    Flag("log", "append messages to this file", str, value="FILE"),
    Flag("log-format", "of that file", str, default="text", choices=("text", "json")),
    Flag("debug", "say more in the log"),
    Flag("systemd-cgroup", "have control groups made by systemd: cgroupsPath is slice:prefix:name"),
    Flag("rootless", "do without root", str, default="auto", choices=("true", "false", "auto")),
    Flag("version v", "tell the version"),
)  # fmt: skip
_BUNDLE = Flag(
    "bundle b", "the folder with config.json (default: this one)", str, default=".", value="FOLDER"
)
_DETACH = Flag("detach d", "do not wait")
_STREAMS = (
    Flag("console-socket", "where the terminal is sent to", str, default="", value="PATH"),
    Flag("pid-file", "where the process's number is written to", str, default="", value="PATH"),
    Flag("preserve-fds", "file descriptors 3 to N+2 stay open", int, default=0, value="N"),
)
_CREATE = (
    _BUNDLE,
    Flag("no-pivot", "for a host whose root is the initial ramdisk"),
    Flag("no-new-keyring", "keep the caller's session keyring"),
    *_STREAMS,
)
_FORMAT = Flag("format f", "of the output", str, default="table", choices=("table", "json"))
#: Options of `update` that stand for one limit each.
UPDATES: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("cpu-period", int), ("cpu-quota", int), ("cpu-share", int), ("cpuset-cpus", str), ("cpuset-mems", str),
    ("memory", int), ("memory-reservation", int), ("memory-swap", int), ("pids-limit", int),
    ("blkio-weight", int),
)  # fmt: skip

VERBS = {
    "create": Verb("make a container", *_CREATE),
    "run": Verb(
        "make a container, start it, and wait for its end",
        *_CREATE,
        _DETACH,
        Flag("keep", "do not delete it at its end"),
    ),
    "exec": Verb(
        "run one more process in a container",
        *_STREAMS,
        _DETACH,
        Flag("process p", "the process as JSON", str, value="FILE"),
        Flag("tty t", "with a terminal"),
        Flag("cwd", "its working directory", str, value="PATH"),
        Flag("env e", "one more variable", str, value="NAME=VALUE", many=True),
        Flag("user u", "as whom", str, value="UID[:GID]"),
        Flag("additional-gids g", "one more group", int, value="GID", many=True),
        Flag("cap c", "one more capability", str, value="CAP_NAME", many=True),
        Flag("no-new-privs", "without the right to get more rights"),
        Flag("apparmor", "its AppArmor profile", str, default="", value="PROFILE"),
        Flag("process-label", "its SELinux label", str, default="", value="LABEL"),
        words=("id", "command*"),
    ),
    "start": Verb("start a container that was created"),
    "state": Verb("tell a container's state as JSON"),
    "pause": Verb("stop all processes of a container for a while"),
    "resume": Verb("let them go on"),
    "kill": Verb(
        "send a signal to a container (SIGTERM)",
        Flag("all a", "to all of its processes"),
        words=("id", "signal?"),
    ),
    "delete": Verb(
        "remove a container that has stopped",
        Flag("force f", "also one that runs, and one that is not there"),
    ),
    "list": Verb("list containers", _FORMAT, Flag("quiet q", "only the ids"), words=()),
    "ps": Verb(
        "list the processes of a container; what follows the id is for the host's ps (default: -ef)",
        _FORMAT,
        words=("id", "arguments*"),
    ),
    "spec": Verb(
        "write a specification to begin with",
        _BUNDLE,
        Flag("rootless", "for others than root", attribute="rootless_spec"),
        words=(),
    ),
    "features": Verb("tell what specifications may ask for", words=()),
    "events": Verb(
        "tell statistics",
        Flag("stats", "once, then end"),
        Flag("interval", "between two of them, as in 500ms (default: 5s)", str, default="5s", value="TIME"),
    ),
    "update": Verb(
        "change limits",
        Flag("resources r", "as JSON; - is the standard input", str, value="FILE"),
        *(Flag(name, "the limit itself", kind) for name, kind in UPDATES),
    ),
}


def parse(argv: list[str]) -> Options:
    """`verb` is empty where there is none; `help` is a text to show instead of doing anything. Raises UsageError."""
    options = Options()
    words = iter(argv)
    _set_defaults(options, FLAGS)
    word = _take_flags(options, FLAGS, words, "runk")
    if options.help or word is None:
        return options
    verb = VERBS.get(word)
    if verb is None:
        raise UsageError(f"unknown verb {word!r}; see runk --help")
    options.verb = word
    _set_defaults(options, verb.flags)
    _take_words(options, verb, words, f"runk {word}")
    return options


def _set_defaults(options: Options, flags: tuple[Flag, ...]) -> None:
    for flag in flags:
        setattr(options, flag.attribute, [] if flag.many else flag.default)


def _take_words(options: Options, verb: Verb, words: Iterator[str], place: str) -> None:
    """The words of a verb, with its flags before, between and after them."""
    missing = list(verb.words)
    for name in missing:
        setattr(options, name.rstrip("?*"), [] if name[-1] == "*" else "")
    while (word := _take_flags(options, verb.flags, words, place)) is not None:
        if not missing:
            raise UsageError(f"{place}: {word!r} is one word too many; see {place} --help")
        setattr(options, missing.pop(0).rstrip("?"), word)
        if missing and missing[0][-1] == "*":
            setattr(options, missing.pop(0)[:-1], [*words])
    if missing and missing[0][-1] != "?" and not options.help:
        raise UsageError(f"{place}: {missing[0].upper()} is missing; see {place} --help")


def _take_flags(options: Options, flags: tuple[Flag, ...], words: Iterator[str], place: str) -> str | None:
    """Up to the next word that is none, which is returned."""
    for word in words:
        if word == "--":
            return next(words, None)
        if not word.startswith("-") or word == "-":
            return word
        if word in ("--help", "-h"):
            options.help = options.help or _help(options.verb)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flag = next((each for each in flags if each.name == name), None)
            _set(options, flag, value if equals else None, words, word, place)
        else:
            _take_short(options, flags, word, words, place)
    return None


def _take_short(
    options: Options, flags: tuple[Flag, ...], word: str, words: Iterator[str], place: str
) -> None:
    """Several without values may stand in one word; after one with a value, the rest of the word is that."""
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        flag = next((each for each in flags if each.short == letter), None)
        value = None
        if flag is not None and flag.kind is not None and letters:
            value, letters = letters.removeprefix("="), ""
        _set(options, flag, value, words, word, place)


def _set(
    options: Options, flag: Flag | None, value: str | None, words: Iterator[str], word: str, place: str
) -> None:
    if flag is None:
        raise UsageError(f"{place}: unknown option {word}; see {place} --help")
    if flag.kind is None:
        if value not in (None, *_TRUE, *_FALSE):
            raise UsageError(f"{place}: {word}: want true or false")
        setattr(options, flag.attribute, value not in _FALSE)
        return
    if value is None:
        value = next(words, None)
        if value is None:
            raise UsageError(f"{place}: {word} needs a value")
    if flag.choices and value not in flag.choices:
        raise UsageError(f"{place}: --{flag.name}: want one of {', '.join(flag.choices)}, got {value!r}")
    try:
        made = flag.kind(value)
    except ValueError:
        raise UsageError(f"{place}: --{flag.name}: want a number, got {value!r}") from None
    setattr(options, flag.attribute, [*getattr(options, flag.attribute), made] if flag.many else made)


def _help(name: str) -> str:
    verb = VERBS.get(name)
    if verb is None:
        rows = [(each, verb.text) for each, verb in VERBS.items()]
        head = "usage: runk [OPTIONS] VERB ...\n\nRun containers on this host, as the OCI's specification has it."
        return (
            f"{head}\n\nverbs, each with help of its own (runk VERB --help):\n{_table(rows)}\n\noptions:\n"
            + _table(_flag_rows(FLAGS))
        )
    shown = {"": "{}", "?": "[{}]", "*": "[{}...]"}
    words = "".join(
        " " + shown[each[-1] if each[-1] in "?*" else ""].format(each.rstrip("?*").upper())
        for each in verb.words
    )
    head = f"usage: runk [OPTIONS] {name}{' [OPTIONS]' if verb.flags else ''}{words}\n\n{verb.text}"
    return f"{head}\n\noptions:\n{_table(_flag_rows(verb.flags))}" if verb.flags else head


def _flag_rows(flags: tuple[Flag, ...]) -> list[tuple[str, str]]:
    return [
        (
            (f"-{flag.short}, " if flag.short else "    ") + f"--{flag.name}"
            + (f" {flag.value}" if flag.kind is not None else ""),
            flag.text,
        )
        for flag in flags
    ]  # fmt: skip


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(first) for first, _ in rows)
    return "\n".join(f"  {first:{width}}  {second}" for first, second in rows)

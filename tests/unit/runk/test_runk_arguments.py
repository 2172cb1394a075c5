"""The command line of runk: flags of its callers, signals, processes of exec."""

from __future__ import annotations

import signal

import pytest

from oci_engine.errors import EngineError
from runk.arguments import VERBS, UsageError, parse
from runk.cli import parse_interval, run
from runk.default_spec import default_spec
from runk.exec_process import process_document
from runk.signals import parse_signal

# As containerd's shim, Podman's conmon and Docker write them.
LINES = [
    "--root /r --log /l --log-format json create --bundle /b --pid-file /p --console-socket /s c1",
    "--root /r --log /l create --bundle /b --pid-file /p --no-pivot --no-new-keyring --preserve-fds 3 c1",
    "--root /r --log /l --log-format json start c1",
    "--root /r --log /l --log-format json exec --process /f --console-socket /s --pid-file /p --detach c1",
    "--root /r --log /l --log-format json kill --all c1 9",
    "--root /r --log /l --log-format json delete --force c1",
    "--root /r --log /l --log-format json ps --format json c1",
    "--root /r --log /l --log-format json update --resources - c1",
    "--root /r events --stats c1",
    "--root=/r --log=/l state c1",
    "--rootless=auto list --format=json",
    "exec --pid-file /p --process /f --tty c1",
    "run -d -b /b --pid-file /p c1",
    "exec -t -e A=b -e C=d --cwd / c1 sh -c true",
    "ps c1 -ef",
]


@pytest.mark.parametrize("line", LINES)
def test_callers_lines(line: str) -> None:
    options = parse(line.split())
    assert options.verb in line.split()
    assert getattr(options, "id", "c1") == "c1"


def test_the_rest_is_the_commands() -> None:
    options = parse(["exec", "-t", "c1", "ls", "-t", "--tty"])
    assert options.command == ["ls", "-t", "--tty"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("checkpoint c1", "unknown verb 'checkpoint'"), ("start", "runk start: ID is missing"),
        ("create -b /b", "runk create: ID is missing"), ("kill", "runk kill: ID is missing"),
        ("start --force c1", "runk start: unknown option --force"), ("start c1 c2", "'c2' is one word too many"),
        ("--roo /x list", "runk: unknown option --roo"), ("--root", "--root needs a value"),
        ("--log-format xml list", "--log-format: want one of text, json, got 'xml'"),
        ("run --preserve-fds x c1", "--preserve-fds: want a number, got 'x'"),
        ("run -dz c1", "unknown option -dz"), ("run --detach=maybe c1", "want true or false"),
    ],
)  # fmt: skip
def test_lines_that_are_refused(line: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse(line.split())
    assert run(line.split()) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("state c1", "root", ""), ("--root=/r state c1", "root", "/r"), ("list -fjson", "format", "json"),
        ("run -db /b c1", "bundle", "/b"), ("run -db/b c1", "detach", True), ("run --detach=false c1", "detach", False),
        ("run c1 -d", "detach", True), ("kill c1", "signal", ""), ("kill c1 9 --all", "signal", "9"),
        ("exec -e A=b -e C=d c1 sh", "env", ["A=b", "C=d"]), ("exec -g 7 c1 sh", "additional_gids", [7]),
        ("exec c1", "command", []), ("exec --cwd / -- c1 -x", "command", ["-x"]), ("update -r - c1", "resources", "-"),
        ("update --memory 5 c1", "memory", 5), ("update c1", "memory", None), ("", "verb", ""),
    ],
)  # fmt: skip
def test_values(line: str, name: str, value: object) -> None:
    assert getattr(parse(line.split()), name) == value


def test_lists_are_not_shared() -> None:
    parse(["exec", "-e", "A=b", "c1", "sh"])
    assert parse(["exec", "c1", "sh"]).env == []


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    for verb in VERBS:
        assert run([verb, "-h"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: runk [OPTIONS] {verb}")


def test_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("runk version ")
    assert run([]) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9", 9), ("KILL", 9), ("SIGKILL", 9), ("sigterm", 15), ("Hup", 1), ("RTMIN", signal.SIGRTMIN),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3), ("rtmax-1", signal.SIGRTMAX - 1), ("64", 64),
    ],
)  # fmt: skip
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "-9", "SIG", "NOPE", "RTMIN+99", "SIG_DFL", "9.5"])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="unknown signal"):
        parse_signal(text)


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("2m", 120.0)])
def test_intervals(text: str, seconds: float) -> None:
    assert parse_interval(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "0s", "-1s", "1h"])
def test_intervals_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="want a time"):
        parse_interval(text)


def test_process_of_exec() -> None:
    spec = default_spec()
    line = [
        "exec",
        "-e",
        "A=b",
        "--user",
        "5:6",
        "-g",
        "7",
        "--cap",
        "CAP_CHOWN",
        "--no-new-privs",
        "c1",
        "--",
        "ls",
        "-l",
    ]
    document = process_document(parse(line), spec)
    assert document["args"] == ["ls", "-l"]
    assert document["terminal"] is False
    assert document["user"] == {"uid": 5, "gid": 6, "additionalGids": [7]}
    assert isinstance(document["env"], list)
    assert document["env"][-1] == "A=b"
    assert isinstance(document["capabilities"], dict)
    assert "CAP_CHOWN" in document["capabilities"]["effective"]
    assert "CAP_CHOWN" not in document["capabilities"]["ambient"]
    assert spec == default_spec()  # untouched


@pytest.mark.parametrize("user", ["root", "1:", "1:x", ":1", ""])
def test_users_that_are_none(user: str) -> None:
    options = parse(["exec", "c1", "ls"])
    options.user = user or ":"
    with pytest.raises(EngineError, match="--user"):
        process_document(options, default_spec())

"""The command line, in the styles that Go's `flag` package knows."""

from __future__ import annotations

import pytest

from shim.cli import UsageError, parse


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["start"], {"action": "start"}),
        (["-id", "a", "start"], {"id": "a", "action": "start"}),
        (["--id", "a", "start"], {"id": "a", "action": "start"}),
        (["-id=a", "start"], {"id": "a", "action": "start"}),
        (["--id=a=b"], {"id": "a=b"}),
        (["-id="], {"id": ""}),
        (["-id", "-x"], {"id": "-x"}),
        (["-publish-binary", "/bin/x"], {"publish_binary": "/bin/x"}),
        (["-bundle", "/b", "-namespace", "n", "-address", "/s", "-socket", "/t"],
         {"bundle": "/b", "namespace": "n", "address": "/s", "socket": "/t"}),
        (["-debug", "start"], {"debug": True, "action": "start"}),
        (["-debug=true"], {"debug": True}),
        (["-debug=T"], {"debug": True}),
        (["-debug=0"], {"debug": False}),
        (["-debug=false", "start"], {"debug": False, "action": "start"}),
        (["-debug", "-debug=false"], {"debug": False}),
        (["-v"], {"version": True}),
        (["-version"], {"version": True}),
        (["-info"], {"info": True}),
        (["-h"], {"help": True}),
        (["--help"], {"help": True}),
        (["-id", "a", "-id", "b"], {"id": "b"}),
        (["--", "start"], {"action": "start"}),
        (["-id", "a", "--", "-debug"], {"id": "a", "action": "-debug"}),
        (["delete", "-id", "a"], {"id": "a", "action": "delete"}),
        (["-"], {"action": "-"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_accepted(argv: list[str], expected: dict[str, object]) -> None:
    defaults = {
        "namespace": "", "id": "", "address": "", "publish_binary": "", "bundle": "", "socket": "",
        "debug": False, "version": False, "info": False, "help": False, "action": "",
    }  # fmt: skip
    assert vars(parse(argv)) == defaults | expected


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["-nonsense"], "-nonsense"),
        (["-nonsense=1"], "-nonsense"),
        (["-id"], "needs an argument: -id"),
        (["-debug=yes"], "'yes' for -debug"),
        (["-debug="], "'' for -debug"),
        (["start", "delete"], "start delete"),
        (["--", "start", "delete"], "start delete"),
        (["-=x"], "not defined"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(argv: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse(argv)

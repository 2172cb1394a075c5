"""What `runk` tells of itself, and where it keeps states."""

from __future__ import annotations

import json
import os

import pytest

from runk import cli
from runk.arguments import parse


def test_one_version_of_the_specification_in_both_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["features"]) == cli.run(["--version"]) == 0
    document, end = json.JSONDecoder().raw_decode(text := capsys.readouterr().out)
    assert text[end:].endswith(f"\nspec: {document['ociVersionMax']}\n")
    assert document["linux"]["netDevices"] == {"enabled": True}


@pytest.mark.parametrize(
    ("uid", "inside", "xdg", "folder"),
    [
        (0, False, "/x", "/run/runk"), (0, True, "/x", "/x/runk"), (0, True, "", "/run/runk"),
        (7, True, "/x", "/x/runk"),
    ],
)  # fmt: skip
def test_where_states_are(
    uid: int, inside: bool, xdg: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(cli, "_in_user_namespace", lambda: inside)
    monkeypatch.setenv("XDG_RUNTIME_DIR", xdg)
    assert cli._root(parse(["list"])) == folder
    assert cli._root(parse(["--root", "/r", "list"])) == "/r"

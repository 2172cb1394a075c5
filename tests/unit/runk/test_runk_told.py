"""What `runk` tells of itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from runk import cli

if TYPE_CHECKING:
    import pytest


def test_one_version_of_the_specification_in_both_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["features"]) == cli.run(["--version"]) == 0
    document, end = json.JSONDecoder().raw_decode(text := capsys.readouterr().out)
    assert text[end:].endswith(f"\nspec: {document['ociVersionMax']}\n")
    assert document["linux"]["netDevices"] == {"enabled": True}
